"""This file runs the command line as `python -m mergekit_lit`."""

import sys

from mergekit_lit.cli import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# Every check that a change must pass: format, lint, types, layers, tests. `--slow` runs the slow tests alone.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--slow" ]; then
  exec pytest -m slow
fi
ruff format --check .
ruff check .
mypy
lint-imports
# Two processes of one thread each; the slow tests start processes of their own.
pytest --numprocesses=2 "$@"

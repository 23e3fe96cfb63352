"""Records read back: tables, figures and one self-contained page."""

"""Merge methods, one pure function each, and the engine that runs them."""

"""The merge methods, one pure function each, in a module a family, and what only they share."""

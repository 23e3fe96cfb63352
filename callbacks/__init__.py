"""Observers of training and merging."""

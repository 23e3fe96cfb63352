"""Backbones, heads, shipped initialisations and the structure of a model."""

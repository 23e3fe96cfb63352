"""Thin Lightning shells: experts in training, merged models in evaluation, launching."""

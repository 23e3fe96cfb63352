"""This folder predicts what a merge will reach, from what is known before it is scored."""

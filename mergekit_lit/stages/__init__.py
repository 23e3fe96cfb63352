"""The stages of the path, files in and files out: train, merge, evaluate, report."""

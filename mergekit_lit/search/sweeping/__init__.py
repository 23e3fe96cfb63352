"""Sweeps: one YAML file of axes to thousands of runs, in any number of processes."""

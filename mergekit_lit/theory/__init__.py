"""The mathematics of merging: travel, gradient noise, stability."""

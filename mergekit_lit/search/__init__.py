"""What asks the stages more than once: coefficients chosen on validation data, the quickstart."""

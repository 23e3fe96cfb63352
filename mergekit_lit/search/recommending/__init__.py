"""How to train experts that merge well, chosen before they are trained."""

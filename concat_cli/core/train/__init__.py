"""Training: one loop and one task per stage."""

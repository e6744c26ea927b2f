"""Losses of the three stages, each a function of tensors."""

"""Weights made elsewhere: read without running anything, and brought under our names."""

"""Metrics and the evaluation of weights or of existing result files."""

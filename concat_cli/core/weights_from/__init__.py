"""Weights made elsewhere: the list of published ones, how they come here, what is read of them."""

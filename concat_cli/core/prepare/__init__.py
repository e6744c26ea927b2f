"""Data sets as their publishers offer them -> the one form that training reads, once."""

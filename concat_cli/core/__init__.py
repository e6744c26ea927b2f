"""The shared core: takes values, returns values, never prints, never reads the command line."""

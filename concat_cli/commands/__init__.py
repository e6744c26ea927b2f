"""The commands: each parses, loads a configuration and calls one function of the core."""

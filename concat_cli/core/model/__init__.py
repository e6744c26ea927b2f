"""Networks. Nothing here reads a config: every module takes plain arguments."""

"""The frozen CLIP teacher: encoders, prompts and CLS tokens."""

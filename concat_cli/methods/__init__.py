"""The methods, a folder each; `core/method.py` says what a method brings."""

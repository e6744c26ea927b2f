"""A web page, and an API for programs, that name what is in a picture."""

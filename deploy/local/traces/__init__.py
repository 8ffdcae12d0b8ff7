"""The shipped carbon intensity traces."""

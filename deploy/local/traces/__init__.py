"""Traces of carbon intensity that the project ships."""

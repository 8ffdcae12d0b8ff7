"""Judges, when the grid is clean, how good the answers of every option are."""

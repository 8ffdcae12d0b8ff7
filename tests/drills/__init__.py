"""Fault drills: what must not be lost or doubled, whatever dies. Run from a checkout: `python -m drills --help`."""

"""Fault drills: nothing may be lost, doubled or wrong in sum. Run `python -m tests.drills --help`."""

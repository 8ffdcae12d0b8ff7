"""Fault drills of the router: no request may be lost or answered twice. Run `python -m tests.drills --help`."""

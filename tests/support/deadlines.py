"""Bounds of the tests' waits. A wait ends with its event; only a failure, or a very busy machine, takes this long."""

DEADLINE_S = 180.0
"""For an event."""

REPLY_S = 20.0
"""For the answer to one HTTP request."""

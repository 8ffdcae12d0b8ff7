"""Trace-driven simulation: the services' own decision code on measured requests and recorded carbon intensities."""

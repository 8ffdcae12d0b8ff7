"""Trace-driven what-if: the services' own decisions on measured requests and recorded grids."""

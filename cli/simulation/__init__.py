"""Shows simulations: a table for a terminal, and the paper's figures redrawn on a page."""

from cli.simulation.page import render_page
from cli.simulation.tables import print_summary

__all__ = ["print_summary", "render_page"]

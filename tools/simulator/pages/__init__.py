"""Shows simulations: a table for a terminal, and the paper's figures redrawn on a page."""

from tools.simulator.pages.page import render_page
from tools.simulator.pages.tables import print_summary

__all__ = ["print_summary", "render_page"]

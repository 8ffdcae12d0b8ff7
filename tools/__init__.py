"""Command line, reports and simulator."""

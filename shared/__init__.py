"""Contracts and plumbing that every Sprout service needs; no decision lives here."""

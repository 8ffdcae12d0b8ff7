"""Erases what the tables hold of tenants or single requests, and finds what the topics hold of them."""

"""Tests, fault drills, benchmarks, and what they share."""

"""The evaluator's schema, as ordered SQL files."""

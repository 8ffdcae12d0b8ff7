"""The ledger's schema, as ordered SQL files."""

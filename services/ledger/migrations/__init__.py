"""Tables of the ledger, as SQL files in the order of their names."""

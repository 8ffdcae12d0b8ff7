"""The saving on the meter, computed from the ledger's tables: by the ledger itself, and by `sprout report`."""

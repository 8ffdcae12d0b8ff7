"""The ledger: attributes every metered joule to calls, and writes each call's footprint."""

"""The Sprout services: carbon_feed, router, optimizer, evaluator, ledger."""

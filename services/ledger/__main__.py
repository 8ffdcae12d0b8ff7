"""`python -m services.ledger`."""

from services.ledger.app import main

main()

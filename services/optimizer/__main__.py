"""`python -m services.optimizer`."""

from services.optimizer.app import main

main()

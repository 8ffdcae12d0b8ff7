"""`python -m services.evaluator`."""

from services.evaluator.app import main

main()

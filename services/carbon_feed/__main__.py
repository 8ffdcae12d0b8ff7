"""`python -m services.carbon_feed`."""

from services.carbon_feed.app import main

main()

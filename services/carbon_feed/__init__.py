"""carbon_feed: publishes the carbon intensity of every zone, from a chain of providers."""

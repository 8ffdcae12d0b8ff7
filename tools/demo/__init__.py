"""The demo: a simulated day of carbon intensity and requests through the real services in four minutes."""

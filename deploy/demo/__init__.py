"""The demonstration: a day of grid and traffic through the real services in two minutes."""

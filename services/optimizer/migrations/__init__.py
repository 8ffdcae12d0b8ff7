"""Tables of the optimizer, in the order of their names."""

"""Tables of the optimizer, as SQL files in the order of their names."""

"""Tables of the gateway, as SQL files in the order of their names."""

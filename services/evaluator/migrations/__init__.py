"""Tables of the evaluator, as SQL files in the order of their names."""

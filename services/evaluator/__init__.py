"""The evaluator: measures the quality of answers with an LLM judge, when the grid is clean."""

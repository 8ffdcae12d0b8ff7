"""Model servers: a Triton model repository of stand-ins, of a small real model, and what runs it.

Everything that runs inside Triton's Python backend uses the standard library and numpy only.
"""

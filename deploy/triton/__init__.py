"""Model servers for machines without a GPU: stand-in models and a small real model, served by Triton.

Everything that runs inside Triton's Python backend uses only the standard library and numpy.
"""

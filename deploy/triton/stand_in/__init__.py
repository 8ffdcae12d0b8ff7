"""The stand-in models: recorded answers and measured energy, replayed behind TensorRT-LLM's contract."""

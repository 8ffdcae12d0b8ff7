"""The stand-in models: replay recorded answers and measured energy behind TensorRT-LLM's contracts."""

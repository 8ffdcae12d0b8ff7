"""The client of NVIDIA Triton with TensorRT-LLM."""

"""SmolLM2-135M-Instruct on llama.cpp: a real language model behind TensorRT-LLM's contract, on the CPU."""

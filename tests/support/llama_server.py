"""llama.cpp's own HTTP server with SmolLM2: `python llama_server.py WEIGHTS PORT`, in the environment of Triton."""

import importlib
import sys
import threading

if __name__ == "__main__":
    _, weights, port = sys.argv
    llama = importlib.import_module("xllamacpp")
    settings = llama.CommonParams()
    settings.model.path = weights
    settings.hostnames = ["127.0.0.1"]
    settings.port = int(port)
    settings.n_parallel = 2
    settings.n_ctx = 2 * 1024
    settings.cpuparams.n_threads = 1
    settings.cpuparams.poll = 0
    settings.cpuparams_batch.n_threads = 1
    settings.cpuparams_batch.poll = 0
    settings.model_alias = {"smollm2"}
    server = llama.Server(settings)
    print(server.listening_address, flush=True)
    threading.Event().wait()

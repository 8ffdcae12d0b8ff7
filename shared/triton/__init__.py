"""Asking TensorRT-LLM models on Triton over gRPC: what a model offers, what it is asked, what it answers.

`TritonClient` is all that a caller needs, with `GenerationParameters` and the errors.
"""

from shared.triton.client import Chunk, TritonClient
from shared.triton.contract import Contract, ContractError
from shared.triton.errors import DeadlineExceeded, EndpointUnavailable, GenerationError, InvalidRequest
from shared.triton.generation import Generation
from shared.triton.parameters import GenerationParameters

__all__ = [
    "Chunk",
    "Contract",
    "ContractError",
    "DeadlineExceeded",
    "EndpointUnavailable",
    "Generation",
    "GenerationError",
    "GenerationParameters",
    "InvalidRequest",
    "TritonClient",
]

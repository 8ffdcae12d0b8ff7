"""Between the `ensemble` contract and llama.cpp's completion: what is asked of it, and what its chunks mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.triton.request import GenerationRequest
from deploy.triton.smollm2.parameters import SmolLm2Parameters


class CompletionError(RuntimeError):
    """llama.cpp refused or failed.

    Attributes:
        invalid: the request is at fault, for example a prompt that is too long.
    """

    def __init__(self, message: str, *, invalid: bool = False) -> None:
        super().__init__(message)
        self.invalid = invalid


def completion_body(request: GenerationRequest, parameters: SmolLm2Parameters) -> dict[str, Any]:
    """The request in llama.cpp's terms; always streamed, so that it can be stopped between tokens."""
    body: dict[str, Any] = {
        "prompt": request.text,
        "n_predict": request.max_tokens,
        "stream": True,
        "stop": list(request.stop_words),
        "temperature": parameters.temperature if request.temperature is None else request.temperature,
        "top_p": parameters.top_p if request.top_p is None else request.top_p,
        # A request's energy shall not depend on which prompt came before it.
        "cache_prompt": False,
    }
    optional = {
        "top_k": request.top_k,
        "repeat_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": None if request.seed is None else request.seed % 2**32,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    if request.return_num_input_tokens:
        body["timings_per_token"] = True  # they count the prompt's tokens from the first chunk on
    if request.return_log_probs:
        body["n_probs"] = 1
    return body


@dataclass(slots=True)
class Progress:
    """What has come of one completion so far; chunks are handed to `take` in order.

    Attributes:
        text: not yet sent.
        tokens: not yet sent.
        log_probs: of tokens not yet sent, where they were asked for.
        finished: the last chunk has come.
        prompt_tokens: of the prompt; known at the end, or from the first chunk on where they were asked for.
    """

    text: str = ""
    tokens: int = 0
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    prompt_tokens: int = 0
    _counted: int = 0

    def take(self, chunk: Mapping[str, Any]) -> None:
        """Read one chunk.

        Raises:
            CompletionError: it is an error.
        """
        error = chunk.get("error")
        if error is not None:
            if not isinstance(error, Mapping):
                raise CompletionError(str(error))
            raise CompletionError(str(error.get("message")), invalid=error.get("code") == 400)
        choice = chunk["choices"][0]
        self.text += choice.get("text") or ""
        probabilities = (choice.get("logprobs") or {}).get("content") or []
        self.log_probs += [float(one["logprob"]) for one in probabilities]
        self.prompt_tokens = self.prompt_tokens or int((chunk.get("timings") or {}).get("prompt_n") or 0)
        if choice.get("finish_reason") is None:
            self._count(1)
            return
        self.finished = True
        usage = chunk.get("usage") or {}
        self.prompt_tokens = int(usage.get("prompt_tokens") or self.prompt_tokens)
        # A chunk may hold several tokens that only together are a character.
        self._count(max(0, int(usage.get("completion_tokens") or 0) - self._counted))

    def sent(self) -> None:
        """What was there has been sent."""
        self.text, self.tokens, self.log_probs = "", 0, []

    def _count(self, tokens: int) -> None:
        self._counted += tokens
        self.tokens += tokens

"""Assembles an answer from the parts in which it arrives, and ends it at a stop sequence."""

from collections.abc import Sequence

from shared.inference.base import Generation, GenerationParameters
from shared.inference.tokens import TokenCounts
from shared.inference.triton.wire import Part
from shared.messages.responses import FinishReason, TokenCountSource


class BrokenStreamError(ValueError):
    """The parts of a stream contradict each other: the model does not follow its contract."""


class AnswerAssembler:
    """Takes the parts of an answer in order and returns the text that each one adds.

    Token counts come from the server where it counts, else from a tokenizer where there is one. Otherwise each response
    with text counts as one token, which is how TensorRT-LLM streams by default; requesting log probabilities only to
    count them would cost the server more.
    """

    __slots__ = (
        "_answer", "_cumulative", "_first_s", "_parameters", "_pieces", "_prompt", "_prompt_tokens", "_reason",
        "_received", "_responses", "_scanner", "_started_s", "_tokens",
    )  # fmt: skip

    def __init__(
        self,
        prompt: str,
        parameters: GenerationParameters,
        *,
        started_at_s: float,
        echoes: bool = False,
        cumulative: bool = False,
    ) -> None:
        """Start with an empty answer.

        Args:
            started_at_s: when the request was sent, event time.
            echoes: the model has no input to leave the prompt out, so it is removed from the start of the answer.
            cumulative: each part carries the whole answer so far.
        """
        self._cumulative = cumulative
        self._answer = ""
        self._reason: FinishReason | None = None
        self._prompt = prompt if echoes else ""
        self._parameters = parameters
        self._scanner = StopScanner(parameters.stop)
        self._started_s = started_at_s
        self._first_s: float | None = None
        self._pieces: list[str] = []
        self._received: list[str] = []
        self._responses = 0
        self._tokens: int | None = None
        self._prompt_tokens: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended at a stop sequence; further parts add no text."""
        return self._scanner.stopped

    @property
    def counted(self) -> bool:
        """Whether the server has counted both the prompt's tokens and the answer's."""
        return self._tokens is not None and self._prompt_tokens is not None

    @property
    def received(self) -> str:
        """All text that the server generated, with the stop sequence and what came after it."""
        return "".join(self._received)

    def add(self, part: Part, *, now_s: float) -> str:
        """Add the next part; returns the new text of the answer.

        Raises:
            BrokenStreamError: the part contradicts the parts before it.
        """
        self._reason = part.finish_reason or self._reason
        if part.prompt_tokens is not None:
            self._prompt_tokens = part.prompt_tokens
        text, tokens = self._new_text(part), part.tokens
        if self._prompt and text.startswith(self._prompt) and not self._responses:
            text = text[len(self._prompt) :]
            if tokens is not None and self._prompt_tokens is not None:
                tokens = max(0, tokens - self._prompt_tokens)
        if tokens is not None:
            self._tokens = (self._tokens or 0) + tokens
        if text:
            self._received.append(text)
            self._responses += 1
            if self._first_s is None:
                self._first_s = now_s
        added = self._scanner.feed(text)
        if part.final and not self._scanner.stopped:
            added += self._scanner.flush()
        if added:
            self._pieces.append(added)
        return added

    def flush(self) -> str:
        """The text that was held back, where the stream ended without a final part."""
        added = "" if self._scanner.stopped else self._scanner.flush()
        if added:
            self._pieces.append(added)
        return added

    def result(self, *, now_s: float, counts: TokenCounts | None = None) -> Generation:
        """The whole answer.

        Args:
            now_s: when the last part was received, event time.
            counts: a tokenizer's counts, for a server that does not count.
        """
        tokens = self._responses
        source: TokenCountSource = "stream"
        if self._tokens is not None:
            tokens, source = self._tokens, "server"
        elif counts is not None:
            tokens, source = counts.completion, "tokenizer"
        prompt_tokens = self._prompt_tokens
        if prompt_tokens is None and counts is not None:
            prompt_tokens = counts.prompt
        return Generation(
            text="".join(self._pieces),
            finish_reason=self._finish_reason(tokens),
            completion_tokens=tokens,
            prompt_tokens=prompt_tokens,
            token_count_source=source,
            started_at_s=self._started_s,
            first_token_at_s=self._first_s,
            finished_at_s=now_s,
        )

    def _new_text(self, part: Part) -> str:
        if not self._cumulative:
            return part.text
        # An incomplete character appears as U+FFFD first, and as itself later.
        text = part.text if part.final else part.text.rstrip("\ufffd")
        before = self._answer
        if before.startswith(text):
            return ""
        if not text.startswith(before):
            raise BrokenStreamError("a part of the answer does not continue the parts before it")
        self._answer = text
        return text[len(before) :]

    def _finish_reason(self, tokens: int) -> FinishReason:
        if self._scanner.stopped:
            return "stop"
        if self._reason is not None:
            return self._reason
        return "length" if tokens >= self._parameters.max_tokens else "stop"


class StopScanner:
    """Passes a text on piece by piece, up to the first stop sequence.

    Where a piece ends with the beginning of a stop sequence, that end is held back until the next piece decides.

    Attributes:
        stopped: a stop sequence was found; no more text is passed on.
    """

    __slots__ = ("_held", "_longest", "_sequences", "stopped")

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(one for one in sequences if one)
        self._longest = max(map(len, self._sequences), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Add a piece; returns the text that can be passed on."""
        if self.stopped:
            return ""
        if not self._sequences:
            return piece
        text = self._held + piece
        found = [index for one in self._sequences if (index := text.find(one)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, once no more text can follow."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop sequence."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(one.startswith(end) for one in self._sequences):
                return length
        return 0

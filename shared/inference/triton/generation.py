"""What a generation came to, put together from its parts.

Ends a text at a stop sequence, wherever the pieces in which it arrives are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from shared.inference.base import GenerationParameters
from shared.inference.tokens import TokenCounts
from shared.inference.triton.wire import Part
from shared.messages import FinishReason, TokenCountSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One finished generation; times are event time, seconds since the Unix epoch.

    Attributes:
        text: the answer, without the prompt and without the stop sequence that ended it.
        completion_tokens: counted by `token_count_source`.
        prompt_tokens: null where nothing counts them.
        started_at_s: sent to the model server.
        first_token_at_s: first text received; null for an empty answer.
        finished_at_s: last token received.
    """

    text: str
    finish_reason: FinishReason
    completion_tokens: int
    prompt_tokens: int | None
    token_count_source: TokenCountSource
    started_at_s: float
    first_token_at_s: float | None
    finished_at_s: float

    @property
    def started_at(self) -> datetime:
        """When it was sent to the model server, event time."""
        return datetime.fromtimestamp(self.started_at_s, UTC)

    @property
    def first_token_at(self) -> datetime | None:
        """When the first text came, event time."""
        return None if self.first_token_at_s is None else datetime.fromtimestamp(self.first_token_at_s, UTC)

    @property
    def finished_at(self) -> datetime:
        """When the last token came, event time."""
        return datetime.fromtimestamp(self.finished_at_s, UTC)


class BrokenStreamError(ValueError):
    """A stream whose parts do not fit together: the model does not answer as its contract says."""


class Assembly:
    """Takes the parts of a generation in order and says which text is new.

    Token counts come from the server where it counts, else from a tokenizer where there is one. Otherwise every
    response with text is taken for one token, which is what TensorRT-LLM streams unless it is set to send several at
    once; asking for log probabilities only to count them would cost the server more.
    """

    __slots__ = (
        "_cumulative", "_first_s", "_pieces", "_prompt", "_prompt_tokens", "_reason", "_received", "_responses",
        "_scanner", "_started_s", "_tokens", "_wanted", "_whole",
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
        """Begin.

        Args:
            echoes: the model cannot be told to leave the prompt out, so an answer that begins with it loses it.
            cumulative: every part carries the whole answer so far.
        """
        self._cumulative = cumulative
        self._whole = ""
        self._reason: FinishReason | None = None
        self._prompt = prompt if echoes else ""
        self._wanted = parameters
        self._scanner = StopScanner(parameters.stop)
        self._started_s = started_at_s
        self._first_s: float | None = None
        self._pieces: list[str] = []
        self._received: list[str] = []
        self._responses = 0
        self._tokens: int | None = None
        self._prompt_tokens: int | None = None

    @property
    def overrun(self) -> bool:
        """The answer ended at a stop sequence, and yet the server goes on: it does not know the sequence."""
        return self._scanner.stopped

    @property
    def counted(self) -> bool:
        """Whether the server has counted both the prompt's tokens and the answer's."""
        return self._tokens is not None and self._prompt_tokens is not None

    @property
    def received(self) -> str:
        """All that the server generated, the stop sequence and what came after it included."""
        return "".join(self._received)

    def take(self, part: Part, *, now_s: float) -> str:
        """Take the next part; returns the new text of the answer.

        Raises:
            BrokenStreamError: it does not go on from what came before.
        """
        self._reason = part.finish_reason or self._reason
        if part.prompt_tokens is not None:
            self._prompt_tokens = part.prompt_tokens
        text, tokens = self._news(part), part.tokens
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
        fresh = self._scanner.feed(text)
        if part.final and not self._scanner.stopped:
            fresh += self._scanner.finish()
        if fresh:
            self._pieces.append(fresh)
        return fresh

    def rest(self) -> str:
        """The text that was held back, where the server ended without a final part."""
        fresh = "" if self._scanner.stopped else self._scanner.finish()
        if fresh:
            self._pieces.append(fresh)
        return fresh

    def result(self, *, now_s: float, counts: TokenCounts | None = None) -> Generation:
        """The whole.

        Args:
            counts: a tokenizer's; used where the server has none.
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

    def _news(self, part: Part) -> str:
        if not self._cumulative:
            return part.text
        # A character that is not complete yet is shown as this one, and as itself later.
        text = part.text if part.final else part.text.rstrip("\ufffd")
        before = self._whole
        if before.startswith(text):
            return ""
        if not text.startswith(before):
            raise BrokenStreamError("the parts of the model's answer do not go on from one another")
        self._whole = text
        return text[len(before) :]

    def _finish_reason(self, tokens: int) -> FinishReason:
        if self._scanner.stopped:
            return "stop"
        if self._reason is not None:
            return self._reason
        return "length" if tokens >= self._wanted.max_tokens else "stop"


class StopScanner:
    """Passes a text on piece by piece, up to the first stop sequence.

    A piece that ends with the beginning of a stop sequence is held back until it is clear which of the two it is.

    Attributes:
        stopped: a stop sequence was found; nothing is passed on any more.
    """

    __slots__ = ("_held", "_longest", "_sequences", "stopped")

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(one for one in sequences if one)
        self._longest = max(map(len, self._sequences), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What may be passed on after this piece."""
        if self.stopped:
            return ""
        if not self._sequences:
            return piece
        text = self._held + piece
        found = [place for one in self._sequences if (place := text.find(one)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop sequence."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(one.startswith(end) for one in self._sequences):
                return length
        return 0

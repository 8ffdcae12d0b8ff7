"""What the stand-in model will answer to a prompt, and what that takes: tokens, energy, time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.triton.request import GenerationRequest
from deploy.triton.stand_in.filler import made_up_text
from deploy.triton.stand_in.prompt import REFERENCE_LEVEL, Directive, detect_level, normalised, parse_chat
from deploy.triton.stand_in.workload import CHARACTERS_PER_TOKEN, Entry, Recorded, Workload, unit_hash


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer, planned.

    Attributes:
        text: what is generated, without the prompt.
        tokens: how many tokens it has, >= 1.
        input_tokens: estimated length of the prompt.
        energy_j: energy that it takes, J.
        time_s: time that it takes alone on the GPU, s of event time.
    """

    text: str
    tokens: int
    input_tokens: int
    energy_j: float
    time_s: float

    def truncated(self, tokens: int) -> "Generation":
        """The first `tokens` tokens; text, energy and time shrink in proportion."""
        if tokens >= self.tokens:
            return self
        share = tokens / self.tokens
        return replace(
            self,
            text=self.text[: text_end(self.text, tokens, self.tokens)],
            tokens=tokens,
            energy_j=self.energy_j * share,
            time_s=self.time_s * share,
        )

    def stopped(self, words: Sequence[str]) -> "Generation":
        """The answer up to the first of the stop words, which is kept, as TensorRT-LLM keeps it."""
        ends = [found + len(word) for word in words if (found := self.text.find(word)) >= 0]
        if not ends or min(ends) >= len(self.text):
            return self
        end = min(ends)
        tokens = max(1, min(self.tokens, -(-end * self.tokens // len(self.text))))
        share = tokens / self.tokens
        return replace(
            self, text=self.text[:end], tokens=tokens, energy_j=self.energy_j * share, time_s=self.time_s * share
        )


def text_end(text: str, produced: int, tokens: int) -> int:
    """Characters of `text` that the first `produced` of its `tokens` tokens make up: tokens are equal slices of it."""
    return len(text) if produced >= tokens else len(text) * produced // tokens


def estimated_tokens(text: str) -> int:
    """Length of a text in tokens, by its characters; >= 1."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))


class AnswerBook:
    """Answers of one model of the workload."""

    def __init__(self, workload: Workload, *, model: str, catalogue: Sequence[Directive]) -> None:
        """Bind a model.

        Raises:
            WorkloadError: the workload has no answer of this model.
        """
        self._workload = workload
        self._model = model
        self._catalogue = tuple(catalogue)
        self._means = workload.means_of(model)
        self._recorded = [entry for entry in workload.entries if any(name == model for name, _ in entry.responses)]

    def plan(self, request: GenerationRequest) -> Generation:
        """The answer to a request: the recorded one, else a made-up one of a plausible length.

        An unknown prompt, or a level that is not recorded for it, takes its length from an entry that its hash picks
        among the recorded ones, so that a shorter directive shortens it, and the model's mean energy and time per
        token.
        """
        level, chat = detect_level(parse_chat(request.text), self._catalogue)
        entry = self._workload.find(chat.user)
        input_tokens = estimated_tokens(request.text)
        recorded = None if entry is None else entry.responses.get((self._model, level))
        if recorded is not None and entry is not None:
            text = recorded_text(entry, self._model, level, recorded)
            planned = Generation(text, recorded.tokens, input_tokens, recorded.energy_j, recorded.time_s)
        else:
            tokens = self._length(normalised(chat.user), level)
            planned = Generation(
                made_up_text(chat.user, tokens=tokens, key=f"{self._model}/{level}"),
                tokens,
                input_tokens,
                tokens * self._means.energy_j_per_token,
                tokens * self._means.time_s_per_token,
            )
        return planned.stopped(request.stop_words).truncated(request.max_tokens)

    def _length(self, prompt: str, level: str) -> int:
        """Tokens of some recorded answer at the level, else at the next one towards no directive that has one."""
        order = [directive.level for directive in self._catalogue] or [REFERENCE_LEVEL]
        known = order[: order.index(level) + 1] if level in order else order
        first = int(unit_hash(self._model, prompt) * len(self._recorded))
        for candidate in (level, *reversed(known), REFERENCE_LEVEL):
            # Neighbours stand in where the entry that the hash picked lacks the level.
            for offset in range(min(50, len(self._recorded))):
                entry = self._recorded[(first + offset) % len(self._recorded)]
                recorded = entry.responses.get((self._model, candidate))
                if recorded is not None:
                    return recorded.tokens
        return next(
            answer.tokens for (name, _), answer in self._recorded[first].responses.items() if name == self._model
        )


def recorded_text(entry: Entry, model: str, level: str, recorded: Recorded) -> str:
    """The recorded text, else one made up to its length."""
    return recorded.text or made_up_text(entry.prompt, tokens=recorded.tokens, key=f"{model}/{level}")

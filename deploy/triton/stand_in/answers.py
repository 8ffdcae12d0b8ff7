"""Plans the stand-in model's answer to a prompt: its text, tokens, energy and time.

An answer without a recorded text gets a made-up one, which says so and has a plausible length and shape.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from deploy.triton.request import GenerationRequest
from deploy.triton.stand_in.prompt import REFERENCE_LEVEL, Directive, detect_level, normalised, parse_chat
from deploy.triton.stand_in.workload import CHARACTERS_PER_TOKEN, Entry, Recorded, Workload, unit_hash

_DISCLAIMER = "This answer was made up by a stand-in model, which has no recorded text for this prompt."
_SHORT_DISCLAIMER = "Made up by a stand-in model."
_DISCLAIMER_FROM_TOKENS = 40
_SHORT_DISCLAIMER_FROM_TOKENS = 12

_OPENINGS = (
    "In short,", "To begin with,", "As a rule,", "In practice,", "For example,", "By contrast,", "Besides,",
    "Above all,", "In most cases,", "On the other hand,", "As a result,", "In addition,", "More precisely,",
)  # fmt: skip
_SUBJECTS = (
    "the main point", "the usual approach", "a common mistake", "the first step", "the underlying idea",
    "the simplest case", "a good example", "the important difference", "the overall effect", "the next part",
    "a careful reading", "the short version", "the question itself",
)  # fmt: skip
_VERBS = (
    "depends on", "follows from", "is explained by", "has much to do with", "goes back to", "is limited by",
    "can be seen in", "is easier to grasp with", "leads to", "is usually compared with",
)  # fmt: skip
_OBJECTS = (
    "the context", "the details that are given", "a few simple assumptions", "what is already known",
    "how the parts fit together", "the time that is available", "the purpose behind it", "the conditions at the start",
    "a closer look at the facts", "several smaller causes", "the order of the steps", "what one wants to achieve",
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z]{5,}")


@dataclass(frozen=True, slots=True)
class PlannedAnswer:
    """A planned answer.

    Attributes:
        text: of the answer, without the prompt.
        tokens: number of tokens, >= 1.
        input_tokens: estimated length of the prompt.
        energy_j: energy of the whole answer, J.
        time_s: time to generate it with no other request on the GPU, s of event time.
    """

    text: str
    tokens: int
    input_tokens: int
    energy_j: float
    time_s: float

    def truncated(self, tokens: int) -> "PlannedAnswer":
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

    def stopped(self, words: Sequence[str]) -> "PlannedAnswer":
        """The answer up to and including the first stop word, as in TensorRT-LLM."""
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
    """Number of characters in the first `produced` of the `tokens` tokens of a text: tokens are equal slices of it."""
    return len(text) if produced >= tokens else len(text) * produced // tokens


def estimated_tokens(text: str) -> int:
    """Estimated number of tokens of a text, from its characters; >= 1."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))


class RecordedAnswers:
    """The answers of one model of the workload."""

    def __init__(self, workload: Workload, *, model: str, catalogue: Sequence[Directive]) -> None:
        """Select a model.

        Raises:
            WorkloadError: the workload has no answer of this model.
        """
        self._workload = workload
        self._model = model
        self._catalogue = tuple(catalogue)
        self._means = workload.means_of(model)
        self._recorded = [entry for entry in workload.entries if any(name == model for name, _ in entry.responses)]

    def plan(self, request: GenerationRequest) -> PlannedAnswer:
        """Plan the answer to a request: the recorded one, otherwise a made-up one of a plausible length.

        For an unknown prompt, or a level that is not recorded for it, a hash of the prompt selects a recorded entry,
        whose length at the level is used, so that shorter directives give shorter answers. Energy and time follow from
        the model's means per token.
        """
        level, chat = detect_level(parse_chat(request.text), self._catalogue)
        entry = self._workload.find(chat.user)
        input_tokens = estimated_tokens(request.text)
        recorded = None if entry is None else entry.responses.get((self._model, level))
        if recorded is not None and entry is not None:
            text = recorded_text(entry, self._model, level, recorded)
            planned = PlannedAnswer(text, recorded.tokens, input_tokens, recorded.energy_j, recorded.time_s)
        else:
            tokens = self._length(normalised(chat.user), level)
            planned = PlannedAnswer(
                made_up_text(chat.user, tokens=tokens, key=f"{self._model}/{level}"),
                tokens,
                input_tokens,
                tokens * self._means.energy_j_per_token,
                tokens * self._means.time_s_per_token,
            )
        return planned.stopped(request.stop_words).truncated(request.max_tokens)

    def _length(self, prompt: str, level: str) -> int:
        """Tokens of a recorded answer at the level, otherwise at the next less brief level that is recorded."""
        order = [directive.level for directive in self._catalogue] or [REFERENCE_LEVEL]
        known = order[: order.index(level) + 1] if level in order else order
        first = int(unit_hash(self._model, prompt) * len(self._recorded))
        for candidate in (level, *reversed(known), REFERENCE_LEVEL):
            # If the selected entry lacks the level, use the next entries.
            for offset in range(min(50, len(self._recorded))):
                entry = self._recorded[(first + offset) % len(self._recorded)]
                recorded = entry.responses.get((self._model, candidate))
                if recorded is not None:
                    return recorded.tokens
        return next(
            answer.tokens for (name, _), answer in self._recorded[first].responses.items() if name == self._model
        )


def recorded_text(entry: Entry, model: str, level: str, recorded: Recorded) -> str:
    """The recorded text, otherwise a made-up text of the recorded length."""
    return recorded.text or made_up_text(entry.prompt, tokens=recorded.tokens, key=f"{model}/{level}")


def made_up_text(prompt: str, *, tokens: int, key: str) -> str:
    """Make up a text of about `tokens` tokens; the same arguments always give the same text.

    Args:
        prompt: some of its words appear in the text.
        key: anything else that the text should depend on, such as the model and the level.
    """
    seed = int.from_bytes(blake2b(f"{key}\x1f{prompt}".encode(), digest_size=8).digest(), "big")
    chance = random.Random(seed)
    topics = _WORD.findall(prompt[:2_000]) or ["this"]
    length = max(2, round(tokens * CHARACTERS_PER_TOKEN))
    sentences: list[str] = []
    if tokens >= _DISCLAIMER_FROM_TOKENS:
        sentences.append(_DISCLAIMER)
    elif tokens >= _SHORT_DISCLAIMER_FROM_TOKENS:
        sentences.append(_SHORT_DISCLAIMER)
    written = sum(len(sentence) + 1 for sentence in sentences)
    while written < length:
        topic = chance.choice(topics).lower()
        middle = f"{chance.choice(_SUBJECTS)} of {topic} {chance.choice(_VERBS)} {chance.choice(_OBJECTS)}"
        sentence = f"{chance.choice(_OPENINGS)} {middle}." if tokens > 8 else f"{topic.capitalize()}, as it seems."
        sentences.append(sentence)
        written += len(sentence) + 1
    text = " ".join(sentences)
    cut = text.rfind(" ", 0, length + 1)
    return (text[:length] if cut <= 0 else text[:cut]).rstrip(" ,.") + "."

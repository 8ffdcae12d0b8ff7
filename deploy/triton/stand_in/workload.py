"""The workload: recorded prompts with their answers, energy and time, as JSON lines (may be gzipped).

```json
{"task": "trivia", "prompt": "Who wrote Emma?", "preferred": "L1", "reference": "Jane Austen",
 "responses": {"llama-2-13b-chat/L1": {"text": "Jane Austen.", "tokens": 5, "energy_j": 29.4, "time_s": 0.12}}}
```

`preferred` is the level that a judge preferred, or JSON null. Optional are `reference` (the right answer, a text), and
of an answer `text`, `tokens`, `correct` (whether it agrees with `reference`) and `worse` (whether a judge found it
worse than the baseline's answer, which is the L0 answer without this field); a missing token count is estimated as the
energy divided by the model's mean energy per token.
"""

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from deploy.triton.stand_in.prompt import normalised

DEFAULT_J_PER_TOKEN = 5.0
"""For a model without any token count in the workload."""

CHARACTERS_PER_TOKEN = 4.0
"""Typical of English text and current tokenizers."""

MOST_PROBLEMS_KEPT = 20


class WorkloadError(ValueError):
    """A line, or the whole file, cannot be used; the message names file, line, field and remedy."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The recorded answer of one model to one prompt at one level.

    Attributes:
        text: None where it was not kept.
        tokens: generated tokens, >= 1; estimated from the energy where they were not counted.
        energy_j: of this request, J.
        time_s: from the request to its last token, with no other request on the GPU, s.
        correct: whether the answer agrees with the prompt's `reference`; None where it was not checked.
        worse: whether it was judged worse than the baseline's answer; None for that one, and where it was not compared.
    """

    text: str | None
    tokens: int
    energy_j: float
    time_s: float
    correct: bool | None = None
    worse: bool | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt of the workload; `responses` by (model, level), `reference` is the right answer if it is known."""

    prompt: str
    task: str
    preferred: str | None
    responses: Mapping[tuple[str, str], Recorded]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class ModelMeans:
    """Means of a model over all its recorded answers, per generated token."""

    energy_j_per_token: float
    time_s_per_token: float


@dataclass(slots=True)
class Workload:
    """The entries of a workload file that can be used.

    Attributes:
        problems: the first messages about lines that were skipped because they cannot be used.
        skipped: number of such lines.
    """

    entries: list[Entry]
    problems: list[str] = field(default_factory=list)
    skipped: int = 0
    _by_prompt: dict[str, Entry] = field(default_factory=dict)
    _shares: dict[tuple[str, tuple[str, ...]], dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_prompt = {normalised(entry.prompt): entry for entry in self.entries}

    @property
    def models(self) -> tuple[str, ...]:
        """Every model with a recorded answer."""
        return tuple(sorted({model for entry in self.entries for model, _ in entry.responses}))

    def levels_of(self, model: str) -> tuple[str, ...]:
        """Every level at which a model was recorded, in order."""
        return tuple(sorted({level for entry in self.entries for name, level in entry.responses if name == model}))

    def find(self, user_text: str) -> Entry | None:
        """The entry of a prompt; None if there is none.

        Where a chat template puts a system message at the start of the user's text, the prompt is the rest after the
        first paragraphs, so up to four are removed.
        """
        found = self._by_prompt.get(normalised(user_text))
        rest = user_text
        for _ in range(4):
            if found is not None or "\n\n" not in rest:
                break
            rest = rest.partition("\n\n")[2]
            found = self._by_prompt.get(normalised(rest))
        return found

    def means_of(self, model: str) -> ModelMeans:
        """Energy and time per token of a model.

        Raises:
            WorkloadError: no answer of this model is recorded.
        """
        recorded = [answer for entry in self.entries for (name, _), answer in entry.responses.items() if name == model]
        if not recorded:
            raise WorkloadError(
                f"the workload has no answers of model {model!r} (it has: {', '.join(self.models) or 'none'}); "
                "give a workload that has, or serve one of these"
            )
        tokens = sum(answer.tokens for answer in recorded)
        return ModelMeans(
            energy_j_per_token=sum(answer.energy_j for answer in recorded) / tokens,
            time_s_per_token=sum(answer.time_s for answer in recorded) / tokens,
        )

    def preference_shares(self, task: str, levels: Sequence[str]) -> dict[str, float]:
        """Share of each of these levels among the preferences of a task; otherwise of all tasks, otherwise even."""
        key = (task, tuple(levels))
        known = self._shares.get(key)
        if known is None:
            judged = [entry for entry in self.entries if entry.preferred in levels]
            of_task = [entry for entry in judged if entry.task == task] or judged
            known = self._shares[key] = {
                level: sum(entry.preferred == level for entry in of_task) / len(of_task) if of_task else 1 / len(levels)
                for level in levels
            }
        return known


def unit_hash(*parts: str) -> float:
    """A deterministic pseudo-random number in [0, 1) from texts."""
    digest = blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def load_workload(path: Path) -> Workload:
    """Read a workload; a line that cannot be used is skipped and noted in `problems`.

    Raises:
        WorkloadError: the file does not exist, is not text, or has no usable line.
    """
    lines: list[dict[str, Any]] = []
    problems: list[str] = []
    skipped = 0
    try:
        for number, text in enumerate(_lines(path), start=1):
            if not text.strip():
                continue
            try:
                lines.append(_checked(text))
            except WorkloadError as error:
                skipped += 1
                if len(problems) < MOST_PROBLEMS_KEPT:
                    problems.append(f"{path}, line {number}: {error}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(
            f"workload {path} cannot be read: {error}; give JSON lines in UTF-8, may be gzipped"
        ) from error
    if not lines:
        raise WorkloadError(
            f"workload {path} has no usable line"
            + (f"; the first problem: {problems[0]}" if problems else ": it is empty")
        )
    j_per_token = _j_per_token(lines)
    return Workload([_entry(line, j_per_token) for line in lines], problems, skipped)


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from file


def _checked(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"not JSON ({error}); write one object on one line") from None
    if not isinstance(line, dict):
        raise WorkloadError("must be a JSON object with 'prompt', 'task' and 'responses'")
    for name in ("prompt", "task"):
        value = line.get(name)
        if not isinstance(value, str) or not value.strip():
            raise WorkloadError(f"'{name}' must be a text, got {_kind(value)}; add it")
    preferred = line.get("preferred")
    if preferred is not None and not isinstance(preferred, str):
        raise WorkloadError(f"'preferred' must be a level such as \"L1\" or null, got {_kind(preferred)}")
    responses = line.get("responses")
    if not isinstance(responses, dict) or not responses:
        raise WorkloadError("'responses' must be an object by \"model/level\" with one entry at least; add it")
    for key, answer in responses.items():
        _check_answer(key, answer)
    return line


def _check_answer(key: str, answer: object) -> None:
    where = f"'responses' of {key!r}"
    model, slash, level = key.rpartition("/")
    if not (model and slash and level):
        raise WorkloadError(f'{where}: the key must be "model/level", for example "llama-2-13b-chat/L1"')
    if not isinstance(answer, dict):
        raise WorkloadError(f"{where} must be an object with 'energy_j' and 'time_s', got {_kind(answer)}")
    for name in ("energy_j", "time_s"):
        value = answer.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise WorkloadError(f"{where}: '{name}' must be a number greater than 0, got {value!r}")
    tokens = answer.get("tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise WorkloadError(f"{where}: 'tokens' must be a whole number from 1, or absent, got {tokens!r}")
    text = answer.get("text")
    if text is not None and not isinstance(text, str):
        raise WorkloadError(f"{where}: 'text' must be a text, or absent, got {_kind(text)}")
    for name in ("correct", "worse"):
        value = answer.get(name)
        if value is not None and not isinstance(value, bool):
            raise WorkloadError(f"{where}: '{name}' must be true, false or absent, got {_kind(value)}")


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _j_per_token(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean energy per token of every model, from the answers whose tokens were counted."""
    energy_j: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for line in lines:
        for key, answer in line["responses"].items():
            if answer.get("tokens") is not None:
                model = key.rpartition("/")[0]
                energy_j[model] += answer["energy_j"]
                tokens[model] += answer["tokens"]
    return {model: energy_j[model] / tokens[model] for model in tokens}


def _entry(line: dict[str, Any], j_per_token: Mapping[str, float]) -> Entry:
    responses: dict[tuple[str, str], Recorded] = {}
    for key, answer in line["responses"].items():
        model, _, level = key.rpartition("/")
        tokens = answer.get("tokens")
        if tokens is None:
            tokens = max(1, round(answer["energy_j"] / j_per_token.get(model, DEFAULT_J_PER_TOKEN)))
        text = answer.get("text") or None
        responses[model, level] = Recorded(
            text, tokens, float(answer["energy_j"]), float(answer["time_s"]), answer.get("correct"), answer.get("worse")
        )
    return Entry(line["prompt"], line["task"], line.get("preferred"), responses, _reference(line.get("reference")))


def _reference(value: object) -> str | None:
    """The right answer; recordings made elsewhere may have other values than a text here, which say nothing."""
    return (value.strip() or None) if isinstance(value, str) else None

"""Files of candidate directives and of prompts."""

import gzip
import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.evaluator.answers import normalised
from shared.fleet import Directive, Fleet
from shared.kafka.records import describe
from shared.messages.generation import ReferenceAnswer

MAX_CANDIDATES: Final = 12
MAX_TEXT_CHARS: Final = 4_000
MAX_CANDIDATES_BYTES: Final = 1_000_000
MAX_PROMPT_LINES: Final = 100_000
MAX_LINE_CHARS: Final = 1_000_000
MAX_PROMPT_CHARS: Final = 100_000


class InputError(ValueError):
    """A file cannot be used; the message says where, and what to do."""


class TrialPrompt(BaseModel):
    """A line of a file of prompts; other fields are ignored, so that a workload file can be used.

    Attributes:
        reference: the right answer; None: unknown.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")
    reference: ReferenceAnswer = None

    def without_reference(self) -> Self:
        """The same prompt without its reference."""
        return self.model_copy(update={"reference": None})


class _CandidateFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    directives: tuple[Directive, ...] = Field(min_length=1, max_length=MAX_CANDIDATES)


def load_candidates(path: Path, fleet: Fleet) -> tuple[Directive, ...]:
    """Read candidates, in TOML or JSON, in the form of the fleet file's `[[directives]]`.

    Raises:
        InputError: the file cannot be read, or a candidate cannot be tried on this fleet.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CANDIDATES_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_CANDIDATES_BYTES:
        raise InputError(f"{path} has more than {MAX_CANDIDATES_BYTES} bytes: give at most {MAX_CANDIDATES} candidates")
    try:
        document = json.loads(content) if path.suffix == ".json" else tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML (a JSON file's name ends in .json)"
        raise InputError(f"{path} is not {kind}: {error}") from None
    try:
        found = _CandidateFile.model_validate(document).directives
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}; a candidate has 'level', such as L3, and 'text'") from None
    levels, texts = {*fleet.levels}, {_same_text(one.text): one.level for one in fleet.directives}
    for one in found:
        if one.level in levels:
            raise InputError(f"{path}: level {one.level} is in the fleet file, or given twice: give it another number")
        if not one.text.strip():
            raise InputError(f"{path}: {one.level} has no text")
        if len(one.text) > MAX_TEXT_CHARS:
            raise InputError(f"{path}: {one.level} has {len(one.text)} characters, at most {MAX_TEXT_CHARS} are useful")
        if (other := texts.setdefault(_same_text(one.text), one.level)) != one.level:
            raise InputError(f"{path}: {one.level} has the text of {other}: remove one of them")
        levels.add(one.level)
    return found


def load_prompts(path: Path) -> list[TrialPrompt]:
    """Read prompts from JSON lines (perhaps gzipped), each once; references that contradict each other are left out.

    Raises:
        InputError: the file cannot be read, or a line has no prompt.
    """
    found: dict[str, TrialPrompt] = {}
    try:
        for number, line in _lines(path):
            prompt = _prompt(line, where=f"{path}, line {number}")
            known = found.setdefault(prompt.prompt, prompt)
            if known.reference != prompt.reference and _contradict(known, prompt):
                found[prompt.prompt] = known.without_reference()
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if not found:
        raise InputError(f'{path} has no prompts: give lines like {{"prompt": "Who wrote Emma?"}}')
    return list(found.values())


def draw_prompts(prompts: Sequence[TrialPrompt], number: int, *, seed: int) -> list[TrialPrompt]:
    """Draw prompts at random; all of them if there are no more than `number`."""
    return random.Random(seed).sample(prompts, min(number, len(prompts)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARS + 1):
            number += 1
            if len(line) > MAX_LINE_CHARS:
                raise InputError(f"{path}, line {number} has more than {MAX_LINE_CHARS} characters")
            if number > MAX_PROMPT_LINES:
                raise InputError(f"{path} has more than {MAX_PROMPT_LINES} lines: give a part of it")
            if line.strip():
                yield number, line


def _prompt(line: str, *, where: str) -> TrialPrompt:
    try:
        document: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    try:
        return TrialPrompt.model_validate(document)
    except ValidationError as error:
        raise InputError(f'{where}: {describe(error)}; give {{"prompt": "...", "reference": "..."}}') from None


def _contradict(first: TrialPrompt, second: TrialPrompt) -> bool:
    return normalised(first.reference or "") != normalised(second.reference or "")


def _same_text(text: str) -> str:
    return " ".join(text.split()).casefold()

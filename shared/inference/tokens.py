"""Counts tokens with a model's own tokenizer, for servers that do not count.

A count is that of the text that came, tokenized anew: a token that is no text, such as the end of the answer, is not in
it, and a text has now and then another split than the one in which it was generated.
"""

import asyncio
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.fleet import FleetError

LONG_TEXT_CHARS: Final = 20_000
"""A longer text is counted in a thread: it takes tens of milliseconds, in which nothing else would be served."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one generation."""

    prompt: int
    completion: int


class Tokenizer:
    """A model's tokenizer, for counting alone."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Args:
            path: `tokenizer.json`, or a model's folder that has one.

        Raises:
            FleetError: it is missing or unusable, or the package `tokenizers` is not installed.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FleetError(f"tokenizer {path} is neither a tokenizer.json nor a folder with one")
        try:
            library: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise FleetError(
                f"tokenizer {path} needs the package 'tokenizers', which the extras 'router' and 'evaluator' install"
            ) from error
        try:
            self._tokenizer = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise FleetError(f"tokenizer {file} cannot be read: {error}") from error
        # As published, some cut every text at some length, or fill it up to one.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def tokens(self, text: str, *, special: bool) -> int:
        """Tokens of a text.

        Args:
            special: with those that the tokenizer puts around a text, such as begin-of-sequence.
        """
        return len(self._tokenizer.encode(text, add_special_tokens=special).ids)

    async def count(self, prompt: str, completion: str) -> TokenCounts:
        """Tokens of a prompt, as the server puts it into its model, and of what it answered."""
        if len(prompt) + len(completion) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._counts, prompt, completion)
        return self._counts(prompt, completion)

    def _counts(self, prompt: str, completion: str) -> TokenCounts:
        return TokenCounts(self.tokens(prompt, special=True), self.tokens(completion, special=False))


class Tokenizers:
    """Loads tokenizers, each once."""

    def __init__(self) -> None:
        self._loaded: dict[Path, Tokenizer] = {}

    def load(self, path: Path | None) -> Tokenizer | None:
        """The tokenizer at a path; null for none.

        Raises:
            FleetError: it is missing or unusable.
        """
        if path is None:
            return None
        if path not in self._loaded:
            self._loaded[path] = Tokenizer(path)
        return self._loaded[path]

"""Counts tokens with a model's own tokenizer, for servers that do not count.

The received text is tokenized again, so a count can differ slightly from the server's: tokens without text, such as
end-of-sequence, are missing, and a text may be split differently than it was generated.
"""

import asyncio
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.fleet import FleetError

LONG_TEXT_CHARS: Final = 20_000
"""Longer texts are counted in a thread: it takes tens of milliseconds, which would block the event loop."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Number of tokens of one generation."""

    prompt: int
    completion: int


class Tokenizer:
    """A model's tokenizer, used only for counting."""

    def __init__(self, path: Path) -> None:
        """Load the tokenizer.

        Args:
            path: `tokenizer.json`, or a model's folder that has one.

        Raises:
            FleetError: the file is missing or unusable, or the package `tokenizers` is not installed.
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
        # Some published tokenizers truncate or pad every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def tokens(self, text: str, *, special: bool) -> int:
        """Number of tokens of a text.

        Args:
            special: include the tokens that the tokenizer adds to a text, such as begin-of-sequence.
        """
        return len(self._tokenizer.encode(text, add_special_tokens=special).ids)

    async def count(self, prompt: str, completion: str) -> TokenCounts:
        """Count the tokens of a prompt, with those that the server adds to it, and of an answer."""
        if len(prompt) + len(completion) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._counts, prompt, completion)
        return self._counts(prompt, completion)

    def _counts(self, prompt: str, completion: str) -> TokenCounts:
        return TokenCounts(self.tokens(prompt, special=True), self.tokens(completion, special=False))


class Tokenizers:
    """Loads each tokenizer once."""

    def __init__(self) -> None:
        self._loaded: dict[Path, Tokenizer] = {}

    def load(self, path: Path | None) -> Tokenizer | None:
        """The tokenizer at a path; None for no path.

        Raises:
            FleetError: the tokenizer is missing or unusable.
        """
        if path is None:
            return None
        if path not in self._loaded:
            self._loaded[path] = Tokenizer(path)
        return self._loaded[path]

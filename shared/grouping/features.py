"""What a prompt looks like, in numbers: its words, its opening, its shape. No second language model, no vocabulary.

Words and pairs of words, and the opening and closing ones by their place, are hashed into buckets; the shape is a few
counts. Texts stay where they are: of a prompt nothing is kept but numbers. However long it is, looking at it takes no
longer than a router can wait.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from shared.messages import ChatMessage

FEATURES = 2
"""Version of all that follows: weights learned for one are of no use for another."""

WORD_BUCKETS = 16_384
OPENING_BUCKETS = 1_024
HASHED = WORD_BUCKETS + OPENING_BUCKETS
MOST_WORDS = 160
"""Of a prompt that are looked at: its beginning tells its kind."""

MOST_CHARACTERS = 2_000
"""The same for its shape, but for its lengths."""

_WORD = re.compile(r"[a-z]+|\d|[^\sa-z\d]")
_NUMBER = re.compile(r"\d+")
_COUNTED = ("\n", "?", ".", "$", "(", '"', "_", ",", ":")
_SHAPES = 10 + len(_COUNTED)
_DIGITS = b"0123456789"
_CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Looks:
    """A prompt's features, not scaled yet; hardly any bucket of many thousands is hit.

    Attributes:
        buckets: that were hit, in growing order; the words' before the opening's.
        counts: logarithms of how often (log1p), in the same order.
        shape: the counts that are not hashed.
    """

    buckets: NDArray[np.int64]
    counts: Floats
    shape: Floats


def prompt_text(messages: Sequence[ChatMessage]) -> str:
    """What of a conversation tells its group: its last turn, the user's."""
    return messages[-1].content


def feature_count() -> int:
    """Length of `features`."""
    return HASHED + _SHAPES


def look(prompt: str) -> Looks:
    """Look at a prompt."""
    words = _WORD.findall(prompt[: 8 * MOST_WORDS].lower())[:MOST_WORDS]
    ends = np.array([WORD_BUCKETS + _hash(text) % OPENING_BUCKETS for text in _ends(words)], dtype=np.int64)
    hit, times = np.unique(np.concatenate([_word_buckets(words), ends]), return_counts=True)
    return Looks(hit, np.log1p(times, dtype=np.float32), np.array(_shape(prompt), dtype=np.float32))


def features(prompt: str) -> Floats:
    """A prompt's features in a row: the buckets, hit or not, then the shape."""
    looks = look(prompt)
    found = np.zeros(feature_count(), dtype=np.float32)
    found[looks.buckets] = looks.counts
    found[HASHED:] = looks.shape
    return found


def _word_buckets(words: list[str]) -> NDArray[np.int64]:
    """Of every word and of every two that follow each other, beginning and end of the prompt being words too."""
    # No word has a line's end in it, so all are encoded at once.
    encoded = [b"^", *(_bytes("\n".join(words)).split(b"\n") if words else ()), b"$"]
    alone = list(map(crc32, encoded))
    # Of two words the checksum goes on where the first one's ended.
    pairs = map(crc32, [*(b" " + word for word in encoded[1:]), b" "], alone)
    return np.array([*alone, *pairs], dtype=np.int64) % WORD_BUCKETS


def _hash(text: str) -> int:
    return crc32(_bytes(text))


def _bytes(text: str) -> bytes:
    # JSON can say lone surrogates, UTF-8 cannot.
    return text.encode("utf-8", errors="surrogatepass")


def _ends(words: list[str]) -> list[str]:
    """The opening words by their place and together, and the last ones."""
    placed = [f"{place}:{word}" for place, word in enumerate(words[:4])]
    together = [f"together:{' '.join(words[:count])}" for count in (2, 3)]
    return [*placed, *together, *(f"last:{word}" for word in words[-3:])]


def _shape(prompt: str) -> list[float]:
    seen, ending = prompt[:MOST_CHARACTERS], prompt[-MOST_CHARACTERS:].rstrip()
    words = max(1, round(len(seen.split()) * len(prompt) / max(1, len(seen))))
    digits, capitals = _digits_and_capitals(seen)
    return [
        math.log1p(len(prompt)),
        math.log1p(words),
        len(prompt) / words,
        math.log1p(digits),
        math.log1p(len(_NUMBER.findall(seen))),
        math.log1p(capitals),
        math.log1p(len(seen.partition("\n")[0])),
        float(ending.endswith("?")),
        float(ending.endswith(".")),
        float("(A)" in seen or "A." in seen),
        *(math.log1p(seen.count(sign)) for sign in _COUNTED),
    ]


def _digits_and_capitals(text: str) -> tuple[int, int]:
    if text.isascii():
        content = text.encode("ascii")
        return len(text) - len(content.translate(None, _DIGITS)), len(text) - len(content.translate(None, _CAPITALS))
    return sum(map(str.isdigit, text)), sum(map(str.isupper, text))

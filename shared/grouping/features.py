"""Features of a prompt: hashed words, hashed opening and closing words, and a few counts. No model, no vocabulary.

Words and word pairs are hashed into one set of buckets. The opening words (by position) and the last words are hashed
into another. The shape is a vector of counts, such as length and digits. The features keep no text of the prompt. The
time to extract them is bounded, because only the beginning of a long prompt is read.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from shared.messages import ChatMessage

FEATURES: Final = 2
"""Version of the features. Weights learned for one version are useless for another."""

WORD_BUCKETS: Final = 16_384
OPENING_BUCKETS: Final = 1_024
HASHED: Final = WORD_BUCKETS + OPENING_BUCKETS
MAX_WORDS: Final = 160
"""Words that are hashed: the beginning of a prompt shows its kind."""

MAX_CHARACTERS: Final = 2_000
"""Characters from which the shape is counted, except for the lengths."""

_WORD = re.compile(r"[a-z]+|\d|[^\sa-z\d]")
_NUMBER = re.compile(r"\d+")
_COUNTED_SIGNS: Final = ("\n", "?", ".", "$", "(", '"', "_", ",", ":")
_DIGITS: Final = b"0123456789"
_CAPITALS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"

SHAPE_FEATURES: Final = 10 + len(_COUNTED_SIGNS)
FEATURE_COUNT: Final = HASHED + SHAPE_FEATURES
"""Length of the feature vector: word buckets, then opening buckets, then the shape."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class PromptFeatures:
    """Unscaled features of one prompt. Few of the buckets occur, so the hashed part is sparse.

    Attributes:
        buckets: (n,) indices of the buckets that occur, ascending.
        counts: (n,) log1p of the number of occurrences of each bucket.
        shape: (SHAPE_FEATURES,) counts that are not hashed.
    """

    buckets: NDArray[np.int64]
    counts: Floats
    shape: Floats

    def to_bytes(self) -> bytes:
        """Serialise the non-zero features: all indices (uint16), then all values (float32), little-endian."""
        nonzero = np.flatnonzero(self.shape)
        indices = np.concatenate([self.buckets, HASHED + nonzero])
        values = np.concatenate([self.counts, self.shape[nonzero]])
        return indices.astype("<u2").tobytes() + values.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """Parse the result of `to_bytes`."""
        count = len(stored) // 6
        indices = np.frombuffer(stored, "<u2", count).astype(np.int64)
        values = np.frombuffer(stored, "<f4", count, offset=2 * count)
        hashed = indices < HASHED
        shape = np.zeros(SHAPE_FEATURES, dtype=np.float32)
        shape[indices[~hashed] - HASHED] = values[~hashed]
        return cls(indices[hashed], values[hashed], shape)


def prompt_text(messages: Sequence[ChatMessage]) -> str:
    """The part of a conversation that its group is derived from: the last message, which is the user's."""
    return messages[-1].content


def extract_features(prompt: str) -> PromptFeatures:
    """Compute the features of a prompt."""
    words = _WORD.findall(prompt[: 8 * MAX_WORDS].lower())[:MAX_WORDS]
    openings = np.array([WORD_BUCKETS + _hash(text) % OPENING_BUCKETS for text in _first_and_last(words)], np.int64)
    buckets, occurrences = np.unique(np.concatenate([_word_buckets(words), openings]), return_counts=True)
    return PromptFeatures(buckets, np.log1p(occurrences, dtype=np.float32), np.array(_shape(prompt), np.float32))


def _word_buckets(words: list[str]) -> NDArray[np.int64]:
    """Buckets of every word and every pair of neighbours. Markers for begin and end of the prompt count as words."""
    # No word contains a newline, so one call encodes all of them.
    encoded = [b"^", *(_encode("\n".join(words)).split(b"\n") if words else ()), b"$"]
    singles = list(map(crc32, encoded))
    # The checksum of a pair continues from the checksum of its first word.
    pairs = map(crc32, [*(b" " + word for word in encoded[1:]), b" "], singles)
    return np.array([*singles, *pairs], dtype=np.int64) % WORD_BUCKETS


def _hash(text: str) -> int:
    return crc32(_encode(text))


def _encode(text: str) -> bytes:
    # JSON can carry lone surrogates, which UTF-8 cannot.
    return text.encode("utf-8", errors="surrogatepass")


def _first_and_last(words: list[str]) -> list[str]:
    """The first four words with their positions, the first two and three words together, the last three words."""
    positioned = [f"{position}:{word}" for position, word in enumerate(words[:4])]
    together = [f"together:{' '.join(words[:count])}" for count in (2, 3)]
    return [*positioned, *together, *(f"last:{word}" for word in words[-3:])]


def _shape(prompt: str) -> list[float]:
    head, tail = prompt[:MAX_CHARACTERS], prompt[-MAX_CHARACTERS:].rstrip()
    words = max(1, round(len(head.split()) * len(prompt) / max(1, len(head))))
    digits, capitals = _digits_and_capitals(head)
    return [
        math.log1p(len(prompt)),
        math.log1p(words),
        len(prompt) / words,
        math.log1p(digits),
        math.log1p(len(_NUMBER.findall(head))),
        math.log1p(capitals),
        math.log1p(len(head.partition("\n")[0])),
        float(tail.endswith("?")),
        float(tail.endswith(".")),
        float("(A)" in head or "A." in head),
        *(math.log1p(head.count(sign)) for sign in _COUNTED_SIGNS),
    ]


def _digits_and_capitals(text: str) -> tuple[int, int]:
    if text.isascii():
        content = text.encode("ascii")
        return len(text) - len(content.translate(None, _DIGITS)), len(text) - len(content.translate(None, _CAPITALS))
    return sum(map(str.isdigit, text)), sum(map(str.isupper, text))

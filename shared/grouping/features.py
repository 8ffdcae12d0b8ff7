"""What a prompt looks like, in numbers: its words, its opening, its shape. No second language model, no vocabulary.

Words and pairs of words, and the opening and closing ones by their place, are hashed into buckets; the shape is a few
counts. Texts stay where they are: of a prompt nothing is kept but numbers.
"""

import math
import re
from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from shared.messages import ChatMessage

FEATURES = 1
"""Version of all that follows: weights learned for one are of no use for another."""

WORD_BUCKETS = 16_384
OPENING_BUCKETS = 1_024
HASHED = WORD_BUCKETS + OPENING_BUCKETS
MOST_WORDS = 160
"""Of a prompt that are looked at: its beginning tells its kind, and the time to read it is bounded."""

_WORD = re.compile(r"[a-z]+|\d|[^\sa-z\d]")
_NUMBER = re.compile(r"\d+")
_COUNTED = ("\n", "?", ".", "$", "(", '"', "_", ",", ":")
_SHAPES = 10 + len(_COUNTED)

Floats = NDArray[np.float32]


def prompt_text(messages: Sequence[ChatMessage]) -> str:
    """What of a conversation tells its group: its last turn, the user's."""
    return messages[-1].content


def feature_count() -> int:
    """Length of `features`."""
    return HASHED + _SHAPES


def features(prompt: str) -> Floats:
    """A prompt's features, not scaled yet: log counts."""
    found = np.zeros(feature_count(), dtype=np.float32)
    words = ["^", *_WORD.findall(prompt[: 8 * MOST_WORDS].lower())[:MOST_WORDS], "$"]
    for first, second in zip(words, [*words[1:], ""], strict=True):
        found[_bucket(first, WORD_BUCKETS)] += 1.0
        found[_bucket(f"{first} {second}", WORD_BUCKETS)] += 1.0
    for text in _ends(words[1:-1]):
        found[WORD_BUCKETS + _bucket(text, OPENING_BUCKETS)] += 1.0
    np.log1p(found, out=found)
    found[HASHED:] = _shape(prompt)
    return found


def _bucket(text: str, buckets: int) -> int:
    # JSON can say lone surrogates, UTF-8 cannot.
    return crc32(text.encode("utf-8", errors="surrogatepass")) % buckets


def _ends(words: list[str]) -> list[str]:
    """The opening words by their place and together, and the last ones."""
    placed = [f"{place}:{word}" for place, word in enumerate(words[:4])]
    together = [f"together:{' '.join(words[:count])}" for count in (2, 3)]
    return [*placed, *together, *(f"last:{word}" for word in words[-3:])]


def _shape(prompt: str) -> list[float]:
    words = prompt.split()
    stripped = prompt.rstrip()
    return [
        math.log1p(len(prompt)),
        math.log1p(len(words)),
        len(prompt) / max(1, len(words)),
        math.log1p(sum(map(str.isdigit, prompt))),
        math.log1p(len(_NUMBER.findall(prompt))),
        math.log1p(sum(map(str.isupper, prompt))),
        math.log1p(len(prompt.partition("\n")[0])),
        float(stripped.endswith("?")),
        float(stripped.endswith(".")),
        float("(A)" in prompt or "A." in prompt),
        *(math.log1p(prompt.count(sign)) for sign in _COUNTED),
    ]

"""Learned prompt groups: prompts of one group react alike to directives (docs/decisions/0008-prompt-groups.md).

Features of a prompt: hashed words, hashed opening and closing words, and a few counts; no model, no vocabulary. Words
and word pairs are hashed into one set of buckets. The opening words (by position) and the last words are hashed into
another. The shape is a vector of counts, such as length and digits. The features keep no text of the prompt. The time
to extract them is bounded, because only the beginning of a long prompt is read.

Assignment of a prompt to its group, in microseconds: the evaluator clusters prompts in a space that is linear in their
features. A prompt belongs to the nearest cluster centre, which is the group with the highest of one linear score per
group. A known task label adds to the scores. The router has no scikit-learn, so this module uses NumPy only.

`pack` and `unpack` convert the groups to and from the arrays of the message that carries them, without loss.
"""

import base64
import binascii
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from shared.messages import ChatMessage, PackedArray, PromptGrouping

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

DEFAULT_GROUP: Final = "default"
"""The prompt group of a request without a task label, as long as no groups are learned."""

CLASSIFIER: Final = 2
"""Version of the assignment. Arrays of one version are useless for another."""

SHAPE_LIMIT: Final = 4.0
"""Standard deviations at which the shape is clipped."""

MAX_ARRAY_BYTES: Final = 64 * 1024 * 1024
"""Largest size of an unpacked array."""

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


@dataclass(frozen=True, slots=True, eq=False)
class FeatureScaling:
    """Weights of the hashed features, and location and scale of the shape.

    Attributes:
        idf: (HASHED,) inverse document frequency of each bucket; 0 for buckets of a single prompt.
        shape_mean, shape_std: (SHAPE_FEATURES,).
    """

    idf: Floats
    shape_mean: Floats
    shape_std: Floats

    def transform(self, features: PromptFeatures) -> tuple[Floats, Floats]:
        """Scale the features of a prompt: words and opening to unit length each, the shape to about unit length.

        Returns:
            The values of `features.buckets`, and the shape.
        """
        hashed = features.counts * self.idf[features.buckets]
        openings = int(features.buckets.searchsorted(WORD_BUCKETS))
        for part in (slice(openings), slice(openings, None)):
            hashed[part] /= max(math.sqrt(hashed[part] @ hashed[part]), 1e-9)
        standardised = (features.shape - self.shape_mean) / self.shape_std
        clipped: Floats = np.minimum(np.maximum(standardised, -SHAPE_LIMIT), SHAPE_LIMIT)
        return hashed, clipped / np.float32(math.sqrt(len(clipped)))


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroups:
    """One version of learned groups.

    Attributes:
        names: of the groups.
        weights: (FEATURE_COUNT, groups) scores of scaled features, rounded to float16 as on the wire.
        intercept: (groups,).
        task_scores: by task label, (groups,) what it adds to the scores; another label, or none, adds nothing.
    """

    version: str
    names: tuple[str, ...]
    scaling: FeatureScaling
    weights: Floats
    intercept: Floats
    task_scores: Mapping[str, Floats] = field(default_factory=dict)

    def assign(self, prompt: str, task: str | None = None) -> str:
        """Name of a prompt's group."""
        return self.assign_features(extract_features(prompt), task)

    def assign_features(self, features: PromptFeatures, task: str | None = None) -> str:
        """Name of the group of a prompt with these features."""
        return self.names[self._index(features, task)]

    def assign_all(self, prompts: Sequence[str], tasks: Sequence[str | None] | None = None) -> NDArray[np.int64]:
        """Index of every prompt's group in `names`, (prompts,)."""
        labels = [None] * len(prompts) if tasks is None else tasks
        return np.array(
            [self._index(extract_features(prompt), task) for prompt, task in zip(prompts, labels, strict=True)],
            dtype=np.int64,
        )

    def _index(self, features: PromptFeatures, task: str | None) -> int:
        hashed, shape = self.scaling.transform(features)
        # Only the rows of buckets that occur: a dense product would take as long as everything else together.
        scores = hashed @ self.weights[features.buckets] + shape @ self.weights[HASHED:] + self.intercept
        if task is not None and (of_task := self.task_scores.get(task)) is not None:
            scores = scores + of_task
        return int(scores.argmax())


class GroupingError(ValueError):
    """A message contains no prompt groups that this release can use; the text says why."""


def pack(groups: PromptGroups) -> dict[str, PackedArray]:
    """The arrays of a version of prompt groups. Their names are part of the message format."""
    return {
        "telling": _pack(groups.scaling.idf, "<f4"),
        "mean": _pack(groups.scaling.shape_mean, "<f4"),
        "spread": _pack(groups.scaling.shape_std, "<f4"),
        "weights": _pack(groups.weights, "<f2"),
        "intercept": _pack(groups.intercept, "<f4"),
    }


def unpack(message: PromptGrouping) -> PromptGroups:
    """The groups of a message that has a version.

    Raises:
        GroupingError: there is no version, the arrays are not those of prompt groups, or another release wrote them.
    """
    if message.version is None:
        raise GroupingError("the message withdraws learned groups")
    if message.features != FEATURES:
        raise GroupingError(
            f"the message uses prompt features version {message.features}, this release uses {FEATURES}: run the same "
            "release of Sprout everywhere"
        )
    if message.classifier != CLASSIFIER:
        raise GroupingError(
            f"the message uses classifier version {message.classifier}, this release uses {CLASSIFIER}: run the same "
            "release of Sprout everywhere; the evaluator learns new groups after its next evaluation"
        )
    wanted = {
        "telling": (HASHED,),
        "mean": (SHAPE_FEATURES,),
        "spread": (SHAPE_FEATURES,),
        "weights": (FEATURE_COUNT, len(message.names)),
        "intercept": (len(message.names),),
    }
    # Before anything is unpacked: a message of 2.6 MB can hold arrays of 2 GiB.
    if unknown := message.arrays.keys() - wanted:
        raise GroupingError(f"{len(unknown)} arrays are unknown")
    for name, shape in wanted.items():
        if name not in message.arrays:
            raise GroupingError(f"there is no array {name!r}")
        if message.arrays[name].shape != shape:
            raise GroupingError(f"array {name!r} has shape {message.arrays[name].shape}, {shape} is needed")
    if any(len(scores) != len(message.names) for scores in message.task_scores.values()):
        raise GroupingError(f"a task has not one score for each of the {len(message.names)} groups")
    arrays = {name: _unpack(name, message.arrays[name]) for name in wanted}
    return PromptGroups(
        version=message.version,
        names=message.names,
        scaling=FeatureScaling(arrays["telling"], arrays["mean"], arrays["spread"]),
        weights=arrays["weights"].astype(np.float32),
        intercept=arrays["intercept"],
        task_scores={task: np.array(scores, np.float32) for task, scores in message.task_scores.items()},
    )


def _pack(array: NDArray[Any], dtype: str) -> PackedArray:
    content = zlib.compress(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return PackedArray.model_validate(
        {"dtype": dtype, "shape": array.shape, "data": base64.b64encode(content).decode("ascii")}
    )


def _unpack(name: str, packed: PackedArray) -> NDArray[Any]:
    dtype = np.dtype(packed.dtype)
    size = prod(packed.shape) * dtype.itemsize
    if not 0 <= size <= MAX_ARRAY_BYTES:
        raise GroupingError(f"array {name!r} is larger than {MAX_ARRAY_BYTES} bytes")
    try:
        inflating = zlib.decompressobj()
        content = inflating.decompress(base64.b64decode(packed.data, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise GroupingError(f"array {name!r} is damaged: {error}") from None
    if len(content) != size:
        raise GroupingError(f"array {name!r} does not have the size of its shape {packed.shape}")
    return np.frombuffer(content, dtype=dtype).reshape(packed.shape)

"""Converts learned prompt groups to and from the arrays of the message that carries them, without loss."""

import base64
import binascii
import zlib
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.grouping.features import FEATURE_COUNT, FEATURES, HASHED, SHAPE_FEATURES
from shared.grouping.model import CLASSIFIER, FeatureScaling, PromptGroups
from shared.messages import PackedArray, PromptGrouping

MAX_ARRAY_BYTES: Final = 64 * 1024 * 1024
"""Largest size of an unpacked array."""


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

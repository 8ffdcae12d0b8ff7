"""Learned prompt groups to and from the message that carries them: every array by its name, exactly as it is."""

import base64
import binascii
import zlib
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.grouping.features import FEATURES, HASHED, feature_count
from shared.grouping.groups import CLASSIFIER, PromptGroups, Scaling
from shared.messages import PackedArray, PromptGrouping

LARGEST_ARRAY_BYTES: Final = 64 * 1024 * 1024
"""What a packed array may unpack to."""


class GroupingError(ValueError):
    """A message holds no prompt groups that can be used here; the message says why."""


def pack(groups: PromptGroups) -> dict[str, PackedArray]:
    """The arrays of a version of prompt groups."""
    return {
        "telling": _packed(groups.scaling.telling, "<f4"),
        "mean": _packed(groups.scaling.mean, "<f4"),
        "spread": _packed(groups.scaling.spread, "<f4"),
        "weights": _packed(groups.weights, "<f2"),
        "intercept": _packed(groups.intercept, "<f4"),
    }


def unpack(message: PromptGrouping) -> PromptGroups:
    """The groups of a message that has a version.

    Raises:
        GroupingError: the arrays are not those of prompt groups, or another release describes prompts otherwise.
    """
    if message.version is None:
        raise GroupingError("the message gives learned groups up")
    if message.features != FEATURES:
        raise GroupingError(
            f"prompts are described by features {message.features} there and {FEATURES} here: run one release of Sprout"
        )
    if message.classifier != CLASSIFIER:
        raise GroupingError(
            f"groups are told apart by classifier {message.classifier} there and {CLASSIFIER} here: run one release of "
            "Sprout; the evaluator learns groups anew after its next evaluation"
        )
    arrays = {name: _unpacked(name, packed) for name, packed in message.arrays.items()}
    try:
        groups = PromptGroups(
            version=message.version,
            names=message.names,
            scaling=Scaling(arrays["telling"], arrays["mean"], arrays["spread"]),
            weights=arrays["weights"].astype(np.float32),
            intercept=arrays["intercept"],
        )
    except KeyError as error:
        raise GroupingError(f"there is no array {error}") from None
    _check(groups)
    return groups


def _check(groups: PromptGroups) -> None:
    wanted: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
        "telling": (groups.scaling.telling, (HASHED,)),
        "mean": (groups.scaling.mean, (feature_count() - HASHED,)),
        "spread": (groups.scaling.spread, (feature_count() - HASHED,)),
        "weights": (groups.weights, (feature_count(), len(groups.names))),
        "intercept": (groups.intercept, (len(groups.names),)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise GroupingError(f"array {name!r} has shape {array.shape}, {shape} is needed")


def _packed(array: NDArray[Any], dtype: str) -> PackedArray:
    content = zlib.compress(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return PackedArray.model_validate(
        {"dtype": dtype, "shape": array.shape, "data": base64.b64encode(content).decode("ascii")}
    )


def _unpacked(name: str, packed: PackedArray) -> NDArray[Any]:
    dtype = np.dtype(packed.dtype)
    size = prod(packed.shape) * dtype.itemsize
    if not 0 <= size <= LARGEST_ARRAY_BYTES:
        raise GroupingError(f"array {name!r} is larger than {LARGEST_ARRAY_BYTES} bytes")
    try:
        inflating = zlib.decompressobj()
        content = inflating.decompress(base64.b64decode(packed.data, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise GroupingError(f"array {name!r} is damaged: {error}") from None
    if len(content) != size:
        raise GroupingError(f"array {name!r} does not hold what its shape {packed.shape} says")
    return np.frombuffer(content, dtype=dtype).reshape(packed.shape)

"""Mean energy and time of a call by group and option, with what remains unexplained."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tools.reporting.calls import Calls, Floats, Indices, partition


@dataclass(frozen=True, slots=True)
class Cell:
    """Calls of one group under one option.

    Attributes:
        calls: how many.
        mean: energy (J) and time (s); shape (2,).
        covariance: of energy and time between calls; shape (2, 2), zero where there are fewer than two.
    """

    calls: int
    mean: Floats
    covariance: Floats


class Means:
    """Energy and time by (group, option), leaning on coarser evidence where a cell is empty.

    Traffic counts first; where a group was never served so, the evaluator's calls (a fair sample of the same prompts)
    stand in, then the option's mean over all groups.
    """

    def __init__(self, requests: Calls, evaluations: Calls) -> None:
        self._cells: dict[tuple[str, str], Cell] = {}
        self._options: dict[str, Cell] = {}
        for calls in (evaluations, requests):  # what traffic says replaces what the evaluator found
            for (group, option), where in partition(calls.group, calls.option).items():
                self._cells[group, option] = cell_of(calls, where)
            for (option,), where in partition(calls.option).items():
                self._options[option] = cell_of(calls, where)

    def of(self, group: str, option: str) -> Cell | None:
        """The best evidence for a group under an option; None where the option was never served."""
        return self._cells.get((group, option)) or self._options.get(option)

    def measured(self) -> Iterable[tuple[tuple[str, str], Cell]]:
        """Every (group, option) with calls of its own."""
        return self._cells.items()


def cell_of(calls: Calls, where: Indices) -> Cell:
    """Mean and covariance of some calls' energy and time."""
    pairs = np.stack([calls.energy_j[where], calls.processing_s[where]])
    covariance = np.cov(pairs) if len(where) > 1 else np.zeros((2, 2))
    return Cell(calls=len(where), mean=pairs.mean(axis=1), covariance=covariance)

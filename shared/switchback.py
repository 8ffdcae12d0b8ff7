"""The switchback schedule: blocks of time in which the whole fleet serves as it would without Sprout.

The metered energy of these blocks shows what the fleet would use without Sprout (`shared/metered_saving.py`). Time is
divided into blocks of equal length, and blocks into strata of equal size. A keyed hash draws one block of every
stratum, so all services agree on the blocks without talking to each other, and the blocks are spread over time.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from shared.fleet import Switchback
from shared.hashing import uniform

World = Literal["sprout", "reference", "washout"]
"""`reference`: a block without Sprout. `washout`: the fleet still adapts after a change of worlds, so it counts for
neither."""


@dataclass(frozen=True, slots=True)
class SwitchbackSchedule:
    """Which world the fleet lives in, at any time."""

    settings: Switchback

    @property
    def stratum_blocks(self) -> int:
        """Blocks in a stratum, of which one is a reference block; 0 if there are no reference blocks."""
        return round(1.0 / self.settings.share) if self.settings.share > 0 else 0

    def is_reference(self, at: datetime) -> bool:
        """Whether the fleet serves without Sprout at an event time."""
        return self._is_reference_s(at.timestamp())

    def world(self, at: datetime) -> World:
        """The world that measurements at an event time count for."""
        now_s = at.timestamp()
        reference = self._is_reference_s(now_s)
        if self.stratum_blocks == 0:
            return "sprout"
        if self._is_reference_s(now_s - self.settings.washout_s) != reference:
            return "washout"
        return "reference" if reference else "sprout"

    def next_change(self, at: datetime) -> datetime | None:
        """The next time after `at` at which the world changes; None if it never does."""
        if self.stratum_blocks < 2:
            return None
        now_s, block_s = at.timestamp(), self.settings.block_s
        reference = self._is_reference_s(now_s)
        block = int(now_s // block_s) + 1
        # Two strata in a row contain at least one change.
        while self._is_reference_s(block * block_s) == reference:
            block += 1
        return datetime.fromtimestamp(block * block_s, at.tzinfo)

    def _is_reference_s(self, at_s: float) -> bool:
        if self.stratum_blocks == 0:
            return False
        block = int(at_s // self.settings.block_s)
        stratum, place = divmod(block, self.stratum_blocks)
        drawn = uniform(f"switchback:{self.settings.key}", str(stratum))
        return place == int(drawn * self.stratum_blocks)

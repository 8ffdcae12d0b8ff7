"""Unit conversions, written down once."""

from typing import Final

JOULES_PER_KWH: Final = 3_600_000.0

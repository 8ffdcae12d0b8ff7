"""Joules and seconds to grams: total = energy x PUE x intensity + k1 x time (paper, section 3.1)."""

from dataclasses import dataclass

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Grams:
    """gCO2eq of a call; operational and total are unknown where the intensity is."""

    operational_g: float | None
    embodied_g: float
    total_g: float | None


def operational_g(*, energy_kwh: float, pue: float, intensity_g_per_kwh: float) -> float:
    """Emitted to make the electricity, with the site's overhead."""
    return energy_kwh * pue * intensity_g_per_kwh


def embodied_g(*, processing_s: float, embodied_g_per_s: float) -> float:
    """The call's share of what the server's making emitted (k1)."""
    return processing_s * embodied_g_per_s


def grams_of(
    *, energy_j: float, processing_s: float, pue: float, intensity_g_per_kwh: float | None, embodied_g_per_s: float
) -> Grams:
    """Both, and their sum."""
    made_g = embodied_g(processing_s=processing_s, embodied_g_per_s=embodied_g_per_s)
    if intensity_g_per_kwh is None:
        return Grams(None, made_g, None)
    used_g = operational_g(energy_kwh=energy_j / JOULES_PER_KWH, pue=pue, intensity_g_per_kwh=intensity_g_per_kwh)
    return Grams(used_g, made_g, used_g + made_g)

"""How many examples a property is tried with."""

from hypothesis import settings


def examples(thorough: int) -> int:
    """So many in `make test`, a quarter of them in `make test-unit` (see the profiles in tests/conftest.py)."""
    return max(1, thorough * settings().max_examples // 100)

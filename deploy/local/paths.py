"""Where the local stack keeps what it installs and what it runs on: one folder, ignored by git."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
"""The checkout that this package was loaded from."""

STATE_VARIABLE = "SPROUT_LOCAL_STATE"
"""Environment variable that moves the state folder elsewhere."""


def default_state_dir() -> Path:
    """`.sprout/` in the checkout."""
    return REPOSITORY / ".sprout"

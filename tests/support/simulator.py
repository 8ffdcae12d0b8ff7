"""Small inputs for the simulator's tests."""

from datetime import UTC, datetime

import numpy as np

from tools.simulator.grid import Grid
from tools.simulator.requests import Measured

BEGIN = datetime(2023, 1, 1, tzinfo=UTC)


def grid(hours: int = 400, *, seed: int = 1) -> Grid:
    """Carbon intensities of some days: low at night, with noise."""
    rng = np.random.default_rng(seed)
    hour = np.arange(hours)
    return Grid("Z", BEGIN, 250.0 - 120.0 * np.cos(2 * np.pi * hour / 24.0) + rng.normal(0.0, 10.0, hours))


def measured(count: int = 400, *, seed: int = 1) -> Measured:
    """Judged prompts of two tasks: brief answers are preferred in the first, long ones in the second."""
    rng = np.random.default_rng(seed)
    task = rng.integers(0, 2, count)
    shares = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    preferred = np.array([rng.choice(3, p=shares[kind]) for kind in task])
    energy = np.array([8e-4, 3e-4, 1e-4]) * rng.uniform(0.5, 1.5, (count, 3))
    return Measured(
        model="m",
        prompts=tuple(f"{('fact', 'sum')[kind]} {number}" for number, kind in enumerate(task)),
        tasks=("facts", "sums"),
        task=task,
        levels=("L0", "L1", "L2"),
        energy_kwh=energy,
        time_s=energy * 1e4,
        tokens=energy * 6e5,
        preferred=preferred,
        correct=(rng.random((count, 3)) < [0.8, 0.75, 0.7]).astype(float),
        small_kwh=energy[:, 0] * 0.6,
        small_s=energy[:, 0] * 6e3,
    )

"""Plays scenarios one after the other on one ground."""

from collections.abc import Sequence
from pathlib import Path

from deploy.local.java import Say
from tests.drills.ground import Ground
from tests.drills.result import Result
from tests.drills.run import Run
from tests.drills.scenarios import SCENARIOS


async def play(names: Sequence[str], *, seed: int, scale: float, folder: Path, say: Say) -> list[Result]:
    """Play scenarios of `SCENARIOS`; returns what they have shown.

    Args:
        scale: share of the full numbers of requests and faults.
        folder: for logs and data; what is in it may be replaced.

    Raises:
        NoJavaError, KafkaInstallationError, ModelServerError, ProcessFailedError: the ground could not be prepared.
    """
    results = []
    async with Ground(folder, say=say) as ground:
        for place, name in enumerate(names, start=1):
            say(f"== {name} ({place} of {len(names)}): {_summary(name)}")
            result = await _play(Run(ground, name, seed, scale, say))
            say(f"   {'passed' if result.passed else 'FAILED: ' + '; '.join(result.problems)}, {result.seconds:.0f} s")
            results.append(result)
    return results


async def _play(run: Run) -> Result:
    try:
        try:
            await SCENARIOS[run.scenario](run)
        except Exception as error:  # noqa: BLE001 - the other scenarios are to be played all the same
            run.failed(error)
        return await run.conclude()
    finally:
        await run.close()


def _summary(name: str) -> str:
    return (SCENARIOS[name].__doc__ or "").partition("\n")[0]

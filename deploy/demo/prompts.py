"""The prompts of a workload, as the demo asks them."""

from pathlib import Path

from deploy.demo.traffic import Prompt
from deploy.triton.stand_in.workload import load_workload


def prompts_of(workload: Path, *, tasks: frozenset[str] = frozenset()) -> list[Prompt]:
    """The judged prompts of a workload, whose answers' texts were kept; all of them where none was judged.

    Args:
        tasks: those to keep to; none, or none that the workload has: every task.

    Raises:
        WorkloadError: the file cannot be read, or has no usable line.
    """
    entries = load_workload(workload).entries
    judged = [entry for entry in entries if entry.preferred is not None] or list(entries)
    wanted = [entry for entry in judged if entry.task in tasks] or judged
    return [Prompt(entry.task, entry.prompt) for entry in wanted]

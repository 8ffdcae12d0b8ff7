"""The prompts of a workload, as the demo asks them."""

from pathlib import Path

from deploy.demo.traffic import Prompt
from deploy.triton.stand_in.workload import load_workload


def prompts_of(workload: Path) -> list[Prompt]:
    """The judged prompts of a workload, whose answers' texts were kept; all of them where none was judged.

    Raises:
        WorkloadError: the file cannot be read, or has no usable line.
    """
    entries = load_workload(workload).entries
    judged = [entry for entry in entries if entry.preferred is not None]
    return [Prompt(entry.task, entry.prompt) for entry in judged or entries]

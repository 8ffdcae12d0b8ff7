"""The shipped workload: complete, unique, usable, and with something to gain from directives."""

from collections import Counter
from statistics import fmean

import pytest

from deploy.triton.models import SHIPPED_WORKLOAD
from deploy.triton.stand_in.workload import load_workload
from deploy.triton.workload.build import text

MODEL = "llama-2-13b-chat"
LEVELS = ("L0", "L1", "L2")


@pytest.fixture(scope="module")
def workload():
    return load_workload(SHIPPED_WORKLOAD)


def test_the_file_is_what_the_sources_give():
    assert SHIPPED_WORKLOAD.read_text(encoding="utf-8") == text()


def test_there_are_six_tasks_of_twenty_unique_prompts_without_a_broken_line(workload):
    assert workload.problems == []
    assert Counter(entry.task for entry in workload.entries) == dict.fromkeys(
        ("factual", "instruction", "math", "reading", "reasoning", "summary"), 20
    )
    assert len({entry.prompt for entry in workload.entries}) == 120


def test_every_prompt_has_a_text_at_every_level_and_a_preferred_one(workload):
    for entry in workload.entries:
        assert all(entry.responses[MODEL, level].text for level in LEVELS), entry.prompt
        assert entry.preferred in LEVELS


def test_in_every_task_each_level_is_briefer_and_takes_less_energy_than_the_one_before(workload):
    for task in {entry.task for entry in workload.entries}:
        answers = [entry.responses for entry in workload.entries if entry.task == task]
        for model in workload.models:
            energy = [fmean(one[model, level].energy_j for one in answers) for level in LEVELS]
            assert energy[0] > 1.5 * energy[1] > 1.5 * energy[2], (task, model)


def test_preferences_differ_by_task_so_that_groups_have_something_to_gain(workload):
    shares = {
        task: Counter(entry.preferred for entry in workload.entries if entry.task == task)
        for task in {entry.task for entry in workload.entries}
    }
    assert shares["math"]["L0"] > 10
    assert shares["factual"]["L0"] < 6
    overall = Counter(entry.preferred for entry in workload.entries)
    assert all(overall[level] >= 24 for level in LEVELS)

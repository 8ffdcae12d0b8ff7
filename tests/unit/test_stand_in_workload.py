"""Workload files: reading, estimates, messages about unusable lines; and the shipped workload."""

import gzip
import json
from collections import Counter
from statistics import fmean

import pytest

from deploy.triton.models import SHIPPED_WORKLOAD
from deploy.triton.stand_in.workload import WorkloadError, load_workload
from deploy.triton.workload.build import text as built_text
from services.evaluator.answers import is_right

MODEL = "llama-2-13b-chat"
LEVELS = ("L0", "L1", "L2", "L3")

LINE = {
    "task": "trivia",
    "prompt": "Who wrote Emma?",
    "preferred": "L1",
    "reference": "Jane Austen",
    "responses": {
        "m/L0": {"energy_j": 100.0, "time_s": 0.5, "tokens": 20, "text": "Emma was written by Jane Austen."},
        "m/L1": {"energy_j": 30.0, "time_s": 0.15, "text": "Jane Austen."},
    },
}


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def changed(**changes):
    return {**LINE, **changes}


def answer(**changes):
    return changed(responses={"m/L0": {"energy_j": 1.0, "time_s": 1.0, **changes}})


def test_a_prompt_is_found_regardless_of_white_space(tmp_path):
    workload = load_workload(written(tmp_path / "w.jsonl", LINE))
    entry = workload.find("  Who  wrote\nEmma? ")
    assert entry is not None
    assert entry.responses["m", "L0"].text == "Emma was written by Jane Austen."
    assert workload.find("Who wrote Persuasion?") is None
    assert workload.models == ("m",)
    assert workload.levels_of("m") == ("L0", "L1")


def test_a_prompt_is_found_after_a_system_message_in_the_users_text(tmp_path):
    workload = load_workload(written(tmp_path / "w.jsonl", LINE))
    assert workload.find("You are helpful.\n\nWho wrote Emma?") is not None


def test_a_gzipped_file_is_read(tmp_path):
    path = tmp_path / "w.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(LINE) + "\n").encode()))
    assert len(load_workload(path).entries) == 1


def test_missing_token_counts_follow_from_the_models_mean_energy_per_token(tmp_path):
    workload = load_workload(written(tmp_path / "w.jsonl", LINE))  # counted: 100 J for 20 tokens
    assert workload.entries[0].responses["m", "L1"].tokens == 6


def test_means_are_per_token_over_all_answers(tmp_path):
    means = load_workload(written(tmp_path / "w.jsonl", LINE)).means_of("m")
    assert means.energy_j_per_token == pytest.approx(130 / 26)
    assert means.time_s_per_token == pytest.approx(0.65 / 26)


def test_a_model_that_is_not_recorded_is_rejected_with_the_recorded_ones(tmp_path):
    with pytest.raises(WorkloadError, match=r"no answers of model 'x' \(it has: m\)"):
        load_workload(written(tmp_path / "w.jsonl", LINE)).means_of("x")


def test_preference_shares_are_of_the_task_otherwise_of_all_tasks_otherwise_even(tmp_path):
    workload = load_workload(
        written(
            tmp_path / "w.jsonl",
            changed(prompt="a", preferred="L0"),
            changed(prompt="b", preferred="L1"),
            changed(prompt="c", preferred="L1"),
            changed(prompt="d", preferred="L1", task="maths"),
            changed(prompt="e", preferred=None, task="verse"),
        )
    )
    assert workload.preference_shares("trivia", ["L0", "L1"]) == pytest.approx({"L0": 1 / 3, "L1": 2 / 3})
    assert workload.preference_shares("verse", ["L0", "L1"]) == pytest.approx({"L0": 1 / 4, "L1": 3 / 4})
    assert workload.preference_shares("trivia", ["L2", "L3"]) == {"L2": 0.5, "L3": 0.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        (changed(prompt=" "), "'prompt' must be a text"),
        (changed(task=None), "'task' must be a text, got nothing"),
        (changed(preferred=1), "'preferred' must be a level"),
        (changed(responses={}), "'responses' must be an object"),
        (changed(responses={"m": {}}), 'the key must be "model/level"'),
        (answer(energy_j=None), "'energy_j' must be a number greater than 0, got None"),
        (answer(time_s=-1), "'time_s' must be a number greater than 0, got -1"),
        (answer(energy_j=True), "'energy_j' must be a number"),
        (answer(tokens=0), "'tokens' must be a whole number from 1"),
        (answer(text=3), "'text' must be a text, or absent, got int"),
        (answer(worse="no"), "'worse' must be true, false or absent, got str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_line_is_skipped_and_named_with_its_field(tmp_path, line, message):
    workload = load_workload(written(tmp_path / "w.jsonl", LINE, line, changed(prompt="another")))
    assert len(workload.entries) == 2
    assert workload.skipped == 1
    assert "w.jsonl, line 2:" in workload.problems[0]
    assert message in workload.problems[0]


def test_a_file_without_any_usable_line_is_rejected(tmp_path):
    with pytest.raises(WorkloadError, match=r"no usable line; the first problem: .*line 1.*'prompt'"):
        load_workload(written(tmp_path / "w.jsonl", changed(prompt=None)))
    with pytest.raises(WorkloadError, match="no usable line: it is empty"):
        load_workload(written(tmp_path / "empty.jsonl"))


def test_a_file_that_cannot_be_read_is_rejected(tmp_path):
    with pytest.raises(WorkloadError, match=r"missing\.jsonl cannot be read.*give JSON lines"):
        load_workload(tmp_path / "missing.jsonl")
    (tmp_path / "not.gz").write_bytes(b"plain")
    with pytest.raises(WorkloadError, match="cannot be read"):
        load_workload(tmp_path / "not.gz")


def test_the_measured_workload_is_read_completely(measured_data):
    workload = load_workload(measured_data / "llama2_requests.jsonl.gz")
    assert (len(workload.entries), workload.skipped) == (16_201, 0)
    assert workload.models == ("llama-2-13b-chat", "llama-2-7b-chat")
    assert workload.means_of("llama-2-13b-chat").energy_j_per_token == pytest.approx(5.88, rel=0.01)
    assert workload.means_of("llama-2-7b-chat").energy_j_per_token == pytest.approx(3.21, rel=0.02)


@pytest.fixture(scope="module")
def shipped():
    return load_workload(SHIPPED_WORKLOAD)


def test_the_shipped_file_is_what_the_program_writes():
    assert gzip.decompress(SHIPPED_WORKLOAD.read_bytes()).decode() == built_text()


def test_the_shipped_workload_has_six_tasks_of_two_hundred_unique_prompts_without_a_broken_line(shipped):
    assert shipped.problems == []
    assert Counter(entry.task for entry in shipped.entries) == dict.fromkeys(
        ("factual", "instruction", "math", "reading", "reasoning", "summary"), 200
    )
    assert len({entry.prompt for entry in shipped.entries}) == 1_200


def test_every_prompt_has_a_text_of_both_models_at_every_level_and_a_preferred_one(shipped):
    for entry in shipped.entries:
        assert all(entry.responses[model, level].text for model in shipped.models for level in LEVELS), entry.prompt
        assert entry.preferred in LEVELS
        assert not entry.responses[MODEL, entry.preferred].worse


def test_every_level_takes_less_energy_than_the_one_before(shipped):
    for task in {entry.task for entry in shipped.entries}:
        answers = [entry.responses for entry in shipped.entries if entry.task == task]
        for model in shipped.models:
            energy = {level: fmean(one[model, level].energy_j for one in answers) for level in LEVELS}
            assert energy["L0"] > 1.5 * energy["L1"] > 1.5 * energy["L2"], (task, model)
            assert energy["L0"] > 2 * energy["L3"] > 1.9 * energy["L1"], (task, model)
        large, small = (fmean(one[model, "L0"].energy_j for one in answers) for model in shipped.models)
        assert small < 0.6 * large


def test_an_answer_is_right_if_it_contains_the_reference(shipped):
    for entry in shipped.entries:
        for recorded in entry.responses.values():
            assert (recorded.correct is None) == (entry.reference is None)
            if recorded.correct and entry.reference is not None:
                assert entry.reference in (recorded.text or ""), entry.prompt


def test_no_wrong_answer_of_a_number_contains_the_right_one(shipped):
    numbers = [entry for entry in shipped.entries if (entry.reference or "").isdigit()]
    assert len(numbers) > 300
    for entry in numbers:
        wrong = [one.text for one in entry.responses.values() if one.correct is False]
        assert not any(is_right(text, entry.reference) for text in wrong), entry.prompt


def test_equal_answers_have_equal_verdicts(shipped):
    for entry in shipped.entries:
        verdicts = {}
        for one in entry.responses.values():
            assert verdicts.setdefault(one.text, bool(one.worse)) == bool(one.worse), entry.prompt


def test_preferences_differ_by_task_so_that_prompt_groups_can_gain(shipped):
    worse = {
        task: fmean(bool(entry.responses[MODEL, "L2"].worse) for entry in shipped.entries if entry.task == task)
        for task in {entry.task for entry in shipped.entries}
    }
    assert worse["factual"] < 0.1
    assert worse["math"] > 0.4
    overall = Counter(entry.preferred for entry in shipped.entries)
    assert all(overall[level] >= 150 for level in LEVELS)

"""Correctness by meaning from a file of judged matches; the string matches are kept for tasks of numbers."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tools.simulator.matches import read_matches
from tools.simulator.requests import SimulationInputError, read_measured

LEVELS = ("L0", "L1")


def write_requests(path: Path) -> Path:
    def line(task: str, prompt: str, reference: str | None) -> str:
        responses = {f"m/{level}": {"energy_j": 5.0, "time_s": 1.0, "tokens": 3, "correct": False} for level in LEVELS}
        found = {"task": task, "prompt": prompt, "preferred": "L0", "responses": responses}
        return json.dumps(found if reference is None else {**found, "reference": reference})

    lines = [
        line("facts", "Who?", "Ann"), line("facts", "Where?\nHere", "Rome"), line("facts", "When?", "1984"),
        line("sums", "2+2?", "2+2=<<4>>\n#### 4"), line("sums", "3+3?", "6"), line("open", "A poem", None),
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    return path


def write_matches(path: Path, *rows: str, header: str = "task,option,prompt,match") -> Path:
    text = "\n".join([header, *rows]) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["m.csv", "m.csv.gz"])
def test_prompts_with_matches_use_them_numbers_keep_theirs_and_the_others_have_none(tmp_path, name):
    matches = write_matches(
        tmp_path / name,
        'facts,m/L0,Who?,1', 'facts,m/L1,Who?,0', 'facts,m/L0,"Where?\n Here",0', 'facts,m/L1,"Where? Here",1',
        "facts,other/L0,When?,1",
    )  # fmt: skip
    measured = read_measured(write_requests(tmp_path / "r.jsonl"), matches=read_matches(matches))
    found = dict(zip(measured.prompts, measured.correct.tolist(), strict=True))
    assert found["Who?"] == [1.0, 0.0]
    assert found["Where?\nHere"] == [0.0, 1.0]
    assert found["2+2?"] == found["3+3?"] == [0.0, 0.0]
    assert np.isnan(found["When?"]).all()
    assert np.isnan(found["A poem"]).all()
    assert measured.checkable.sum() == 4


def test_rows_that_contradict_each_other_leave_the_prompt_without_correctness(tmp_path):
    matches = write_matches(
        tmp_path / "m.csv", "t,m/L0,Who?,1", "t,m/L0,Who?,0", "t,m/L0,Who?,1", "t,m/L1,Who?,1", "t,m/L1,Who?,1",
        "t,m/L0,When?,1", "t,m/L1,When?,1",
    )  # fmt: skip
    measured = read_measured(write_requests(tmp_path / "r.jsonl"), matches=read_matches(matches))
    assert measured.checkable.tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (("t,m/L0,Who?,yes",), "task,option,prompt,match", "line 2: 'match' must be 0 or 1, got 'yes'"),
        (("t,m/L0,Who?",), "task,option,prompt,match", "'match' must be 0 or 1, got None"),
        (("t,m/L0,Who?,1",), "task,option,text,match", "has no column 'prompt'"),
        ((), "", "has no column 'option'"),
    ],
)
def test_an_unusable_file_is_named_with_its_line(tmp_path, rows, header, message):
    with pytest.raises(SimulationInputError, match=message):
        read_matches(write_matches(tmp_path / "m.csv", *rows, header=header))


def test_a_file_that_cannot_be_read_or_has_other_prompts_is_rejected(tmp_path):
    with pytest.raises(SimulationInputError, match="cannot be read"):
        read_matches(tmp_path / "none.csv")
    (tmp_path / "no.csv.gz").write_text("text")
    with pytest.raises(SimulationInputError, match="cannot be read"):
        read_matches(tmp_path / "no.csv.gz")
    matches = read_matches(write_matches(tmp_path / "m.csv", "t,m/L0,Other?,1"))
    with pytest.raises(SimulationInputError, match=r"no prompt of .*r.jsonl has matches of m/L0 and m/L1"):
        read_measured(write_requests(tmp_path / "r.jsonl"), matches=matches)


def test_judged_matches_of_the_measured_requests_are_found(measured_data):
    requests = measured_data / "llama2_requests.jsonl.gz"
    by_string = read_measured(requests)
    by_meaning = read_measured(requests, matches=read_matches(measured_data / "gpt4_match.csv.gz"))
    sums = by_string.tasks.index("gsm8k")
    assert (by_meaning.correct[by_meaning.task == sums] == by_string.correct[by_string.task == sums])[
        by_string.checkable[by_string.task == sums]
    ].all()
    assert not by_meaning.checkable[by_meaning.task == by_meaning.tasks.index("alpaca")].any()
    trivia = by_meaning.checkable & (by_meaning.task == by_meaning.tasks.index("triviaqa"))
    assert trivia.sum() > 400
    # By meaning the brief answers to trivia are right more often than the long ones.
    assert by_meaning.correct[trivia, 1].mean() > by_meaning.correct[trivia, 0].mean() + 0.05

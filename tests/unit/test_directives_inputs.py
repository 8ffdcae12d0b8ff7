"""Files of candidate directives and of prompts: forms that are read, and messages about those that are not."""

import gzip
import json
import tomllib
from pathlib import Path

import pytest

from shared.fleet import Fleet
from tests.support.fleets import fleet_toml
from tools.directives.inputs import (
    MAX_CANDIDATES,
    InputError,
    TrialPrompt,
    draw_prompts,
    load_candidates,
    load_prompts,
)

FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
TOML = '[[directives]]\nlevel = "L3"\ntext = "Answer in one sentence."\n'


def candidates(path: Path, *, levels: list[str], texts: list[str]) -> Path:
    directives = [{"level": level, "text": text} for level, text in zip(levels, texts, strict=True)]
    path.write_text(json.dumps({"directives": directives}))
    return path


@pytest.mark.parametrize("name", ["c.toml", "c.json"])
def test_candidates_are_read_from_toml_and_json(tmp_path, name):
    path = tmp_path / name
    path.write_text(TOML if name.endswith("toml") else json.dumps(tomllib.loads(TOML)))
    (found,) = load_candidates(path, FLEET)
    assert (found.level, found.text) == ("L3", "Answer in one sentence.")


@pytest.mark.parametrize(
    ("levels", "texts", "message"),
    [
        (["L1"], ["New."], "level L1 is in the fleet file, or given twice"),
        (["L3", "L3"], ["One.", "Two."], "level L3 is in the fleet file, or given twice"),
        (["L3"], [" \n"], "L3 has no text"),
        (["L3"], ["always answer  briefly."], "L3 has the text of L1"),
        (["L3", "L4"], ["One.", "One."], "L4 has the text of L3"),
        (["L3"], ["x" * 5_000], "L3 has 5000 characters"),
        (["brief"], ["One."], "a candidate has 'level', such as L3, and 'text'"),
        ([], [], "at least 1"),
        (
            [f"L{n}" for n in range(3, 4 + MAX_CANDIDATES)],
            [f"Text {n}." for n in range(1 + MAX_CANDIDATES)],
            "at most 12",
        ),
    ],
)
def test_unusable_candidates_are_named(tmp_path, levels, texts, message):
    with pytest.raises(InputError, match=message):
        load_candidates(candidates(tmp_path / "c.json", levels=levels, texts=texts), FLEET)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "[[directives]\n", "is not TOML"),
        ("c.json", "{", "is not JSON"),
        ("c.json", "[" * 100_000, "is not JSON"),
        ("c.json", '"L3"', "a candidate has"),
        ("c.toml", "# " + "x" * 1_000_000, "more than 1000000 bytes"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_candidates(tmp_path / name, FLEET)


def test_a_missing_file_is_named(tmp_path):
    for read in (load_prompts, lambda path: load_candidates(path, FLEET)):
        with pytest.raises(InputError, match=r"missing.*cannot be read: No such file"):
            read(tmp_path / "missing")


def prompts(path: Path, *lines: object) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prompts_are_read_with_their_references(tmp_path, name):
    lines = ({"prompt": "Who?", "reference": "Ann", "task": "qa"}, {"prompt": "Why?", "reference": " "})
    assert load_prompts(prompts(tmp_path / name, *lines)) == [
        TrialPrompt(prompt="Who?", reference="Ann"),
        TrialPrompt(prompt="Why?"),
    ]


def test_a_prompt_counts_once_and_contradicting_references_do_not(tmp_path):
    lines = [{"prompt": "Who?", "reference": text} for text in ("Ann", "ann.", "Bob")]
    assert load_prompts(prompts(tmp_path / "p", *lines[:2])) == [TrialPrompt(prompt="Who?", reference="Ann")]
    assert load_prompts(prompts(tmp_path / "p", *lines)) == [TrialPrompt(prompt="Who?")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompts"),
        (b'{"prompt": "a"}\n{"task": "b"}\n', "line 2: "),
        (b'{"prompt": " "}\n', "line 1: "),
        (b'{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"x" * 1_000_001, "line 1 has more than 1000000 characters"),
    ],
)
def test_unusable_prompts_are_named_with_their_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_prompts(path)


def test_the_same_seed_draws_the_same_prompts():
    known = [TrialPrompt(prompt=f"Question {number}?") for number in range(100)]
    assert draw_prompts(known, 10, seed=1) == draw_prompts(known, 10, seed=1) != draw_prompts(known, 10, seed=2)
    assert len({one.prompt for one in draw_prompts(known, 200, seed=1)}) == 100

"""The answers of the stand-in model: the recorded text, or a made-up one of a plausible length."""

import itertools
from dataclasses import replace

import pytest

from deploy.triton.request import GenerationRequest
from deploy.triton.stand_in.answers import PlannedAnswer, RecordedAnswers, made_up_text, text_end
from deploy.triton.stand_in.parameters import DEFAULT_DIRECTIVES
from deploy.triton.stand_in.workload import Entry, Recorded, Workload

MODEL = "m"
TEXT = "Rayleigh scattering. Short waves scatter more than long ones do."


def entry(number, **texts):
    tokens = {"L0": 200 + number, "L1": 60 + number, "L2": 20 + number}
    return Entry(
        f"prompt {number}",
        "why",
        "L1",
        {(MODEL, level): Recorded(texts.get(level), n, n * 5.0, n * 0.02) for level, n in tokens.items()},
    )


@pytest.fixture
def answers():
    workload = Workload([entry(0, L0=TEXT), *(entry(number) for number in range(1, 40))])
    return RecordedAnswers(workload, model=MODEL, catalogue=DEFAULT_DIRECTIVES)


def request(user, system="", **changes):
    inner = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}" if system else user
    return GenerationRequest(text=f"[INST] {inner} [/INST]", **{"max_tokens": 1_000, **changes})


def test_a_recorded_prompt_gets_its_recorded_answer(answers):
    planned = answers.plan(request("prompt 0"))
    assert (planned.text, planned.tokens, planned.energy_j, planned.time_s) == (TEXT, 200, 1000.0, 4.0)


def test_the_directive_chooses_the_recorded_level(answers):
    assert [
        answers.plan(request("prompt 3", system)).tokens
        for system in ("", "Always answer briefly.", "Always answer very briefly.")
    ] == [203, 63, 23]


def test_an_answer_without_a_recorded_text_gets_a_made_up_one_of_its_length_that_says_so(answers):
    planned = answers.plan(request("prompt 5"))
    assert planned.tokens == 205
    assert planned.energy_j == 1025.0
    assert len(planned.text) == pytest.approx(205 * 4, rel=0.1)
    assert "made up by a stand-in model" in planned.text


@pytest.mark.parametrize("user", ["A prompt that is not recorded", "Ça va, 日本?", "x"])
def test_for_an_unknown_prompt_a_briefer_directive_gives_a_shorter_answer(answers, user):
    long, brief, briefer = (
        answers.plan(request(user, system)) for system in ("", "Always answer briefly.", "Always answer very briefly.")
    )
    assert long.tokens > brief.tokens > briefer.tokens
    assert long.energy_j == pytest.approx(long.tokens * 5.0)
    assert long.time_s == pytest.approx(long.tokens * 0.02)


def test_the_same_prompt_always_gets_the_same_answer(answers):
    unknown = request("A prompt that is not recorded")
    assert answers.plan(unknown) == answers.plan(unknown)


def test_max_tokens_shortens_text_tokens_energy_and_time_in_proportion(answers):
    whole, half = answers.plan(request("prompt 0")), answers.plan(request("prompt 0", max_tokens=100))
    assert half.tokens == 100
    assert whole.text.startswith(half.text)
    assert len(half.text) == len(whole.text) // 2
    assert (half.energy_j, half.time_s) == (whole.energy_j / 2, whole.time_s / 2)


def test_a_stop_word_ends_the_answer_and_is_part_of_it(answers):
    planned = answers.plan(request("prompt 0", stop_words=("nowhere in it", ". ")))
    assert planned.text == "Rayleigh scattering. "
    assert 0 < planned.tokens < 200
    assert planned.energy_j == pytest.approx(planned.tokens * 5.0)


def test_a_level_that_is_not_recorded_uses_the_next_recorded_one():
    workload = Workload([replace(entry(1), responses={(MODEL, "L0"): Recorded(None, 80, 400.0, 1.6)})])
    answers = RecordedAnswers(workload, model=MODEL, catalogue=DEFAULT_DIRECTIVES)
    assert answers.plan(request("prompt 1", "Always answer briefly.")).tokens == 80


@pytest.mark.parametrize("tokens", [1, 2, 7, 30, 500])
def test_made_up_text_has_about_the_requested_length(tokens):
    text = made_up_text("Explain photosynthesis to a gardener", tokens=tokens, key="m/L0")
    assert 1 < len(text) <= tokens * 4 + 1
    assert len(text) > tokens * 4 - 25
    assert text == made_up_text("Explain photosynthesis to a gardener", tokens=tokens, key="m/L0")


def test_the_tokens_of_a_text_are_slices_that_make_it_up():
    ends = [text_end(TEXT, produced, 30) for produced in range(31)]
    assert ends[0] == 0
    assert ends[-1] == len(TEXT)
    assert ends == sorted(ends)
    assert "".join(TEXT[a:b] for a, b in itertools.pairwise(ends)) == TEXT


def test_an_answer_that_is_short_enough_is_not_changed():
    generation = PlannedAnswer("text", 4, 1, 2.0, 1.0)
    assert generation.truncated(4) is generation
    assert generation.stopped(("absent",)) is generation

"""The stand-in judge: parses the judge prompt, prefers the workload's level, and errs with the given probabilities."""

from dataclasses import replace
from itertools import permutations

import pytest

from deploy.triton.request import GenerationRequest
from deploy.triton.stand_in.answers import recorded_text
from deploy.triton.stand_in.judge import (
    NO_VERDICT,
    Judge,
    JudgePromptError,
    JudgeRules,
    parse_judge_prompt,
    recognised_levels,
)
from deploy.triton.stand_in.workload import Entry, Recorded, Workload, load_workload
from services.evaluator.judges import MeaningCheck

FAIR = JudgeRules(position_bias=0.0)
TEXTS = {
    "L0": "The sky is blue because air scatters short waves of light far more than long ones.",
    "L1": "Air scatters blue light most.",
    "L2": "Scattering.",
}


def entry(number=0, preferred="L1", task="why", texts=TEXTS):
    return Entry(
        f"Why is the sky blue, {number}?",
        task,
        preferred,
        {("m", level): Recorded(text, 10, 50.0, 0.2) for level, text in texts.items()},
    )


def prompt(*answers, number=0, reference=None):
    parts = [f"[Question]\nWhy is the sky blue, {number}?\n\n"]
    if reference:
        parts.append(f"[Reference]\n{reference}\n\n")
    parts += [f"[Answer {letter}]\n{text}\n\n" for letter, text in zip("ABCDEFGH", answers, strict=False)]
    return "".join(parts) + "Which answer is best? Reply with one letter only.\n"


def chosen(judge, answers, **changes):
    return answers["ABCDEFGH".index(judge.verdict(prompt(*answers, **changes)))]


def test_a_judge_prompt_is_parsed():
    read = parse_judge_prompt(prompt("one", "two\n\nwith a gap", "three", reference="because"))
    assert read.question == "Why is the sky blue, 0?"
    assert read.answers == ("one", "two\n\nwith a gap", "three")
    assert read.reference == "because"
    assert parse_judge_prompt(prompt("one", "two")).reference is None
    assert parse_judge_prompt(prompt("", "two")).answers == ("", "two")
    assert len(parse_judge_prompt(prompt(*"12345678")).answers) == 8


@pytest.mark.parametrize("text", ["hello", "[Question]\nwhy?", "[Question]\nwhy?\n\n[Answer A]\nonly one"])
def test_a_text_that_is_not_a_judge_prompt_gets_no_verdict(text):
    with pytest.raises(JudgePromptError):
        parse_judge_prompt(text)
    assert Judge(Workload([entry()]), FAIR).verdict(text) == NO_VERDICT


@pytest.mark.parametrize("order", list(permutations("012")))
@pytest.mark.parametrize("preferred", TEXTS)
def test_the_preferred_levels_answer_wins_in_every_order(order, preferred):
    judge = Judge(Workload([entry(preferred=preferred)]), FAIR)
    answers = [TEXTS[f"L{index}"] for index in order]
    assert chosen(judge, answers) == TEXTS[preferred]


def test_a_text_cut_by_a_token_limit_is_still_recognised():
    assert recognised_levels(entry(), TEXTS["L0"][:30]) == {"L0"}
    assert recognised_levels(entry(), "  Air scatters\nblue light most. ") == {"L1"}
    assert recognised_levels(entry(), "Something else entirely") == frozenset()


def test_equal_texts_are_recognised_as_every_level_that_has_them():
    same = entry(texts={"L0": "long", "L1": "same", "L2": "same"}, preferred="L2")
    assert recognised_levels(same, "same") == {"L1", "L2"}
    assert chosen(Judge(Workload([same]), FAIR), ["long", "same", "same"]) == "same"


def test_texts_made_up_for_the_workload_are_recognised():
    silent = Entry(
        "p", "why", "L1", {("m", level): Recorded(None, n, 5.0, 0.2) for level, n in (("L0", 60), ("L1", 30))}
    )

    for (model, level), recorded in silent.responses.items():
        assert recognised_levels(silent, recorded_text(silent, model, level, recorded)) == {level}


def checked(judge, first, second, *, known=True, number=0):
    question = f"Why is the sky blue, {number}?"
    return judge.verdict(MeaningCheck(question, first, second, known).messages()[-1].content)


def with_reference(reference="scattering", correct=(True, True, False)):
    responses = {
        ("m", level): Recorded(text, 10, 50.0, 0.2, right)
        for (level, text), right in zip(TEXTS.items(), correct, strict=True)
    }
    return replace(entry(), responses=responses, reference=reference)


def test_checks_against_the_reference_follow_the_workload_and_unknown_texts_are_right_if_they_contain_it():
    judge = Judge(Workload([with_reference()]), FAIR)
    assert [checked(judge, "scattering", TEXTS[level]) for level in TEXTS] == ["Yes", "Yes", "No"]
    assert checked(judge, "scattering", "By Rayleigh scattering of light.") == "Yes"
    assert checked(judge, "scattering", "Because of the scatterings.") == "No"
    assert checked(judge, "another reference", TEXTS["L0"]) == "No"
    assert checked(judge, "the same", "the  same", number=5) == "Yes"


def test_checks_of_two_answers_follow_the_workload_and_prompts_without_a_reference_are_open():
    judge = Judge(Workload([with_reference()]), FAIR)
    assert checked(judge, TEXTS["L0"], TEXTS["L1"], known=False) == "Yes"
    assert checked(judge, TEXTS["L0"], TEXTS["L2"], known=False) == "No"
    assert checked(judge, TEXTS["L2"], TEXTS["L2"], known=False) == "Yes"
    assert checked(judge, TEXTS["L0"], "unknown text", known=False) == "No"
    silent = Judge(Workload([entry()]), FAIR)
    assert checked(silent, TEXTS["L0"], TEXTS["L1"], known=False) == "Open"
    assert checked(silent, "one", "another", known=False, number=9) == "Open"


def test_a_judge_may_always_say_yes_or_nothing():
    workload = Workload([with_reference()])
    assert checked(Judge(workload, JudgeRules(yes_bias=1.0)), "scattering", "no") == "Yes"
    assert checked(Judge(workload, JudgeRules(unparseable=1.0)), "scattering", "no") == NO_VERDICT


def test_of_unrecognised_answers_the_one_closest_in_length_to_the_preferred_one_wins():
    judge = Judge(Workload([entry(preferred="L1")]), FAIR)
    close = "x" * len(TEXTS["L1"])
    assert chosen(judge, ["y" * 400, close, "z"]) == close


def test_prompts_without_a_recorded_preference_get_stable_ones_with_the_tasks_shares():
    judged = [entry(number, preferred="L0" if number < 30 else "L1" if number < 90 else "L2") for number in range(100)]
    unjudged = [entry(number, preferred=None) for number in range(1000, 2000)]
    judge = Judge(Workload(judged + unjudged), FAIR)
    answers = list(TEXTS.values())
    verdicts = [judge.verdict(prompt(*answers, number=number)) for number in range(1000, 2000)]
    assert verdicts == [judge.verdict(prompt(*answers, number=number)) for number in range(1000, 2000)]
    assert verdicts.count("A") / 1000 == pytest.approx(0.3, abs=0.05)
    assert verdicts.count("B") / 1000 == pytest.approx(0.6, abs=0.05)


def test_without_an_answer_of_the_preferred_level_another_is_named():
    judge = Judge(Workload([entry(preferred="L0")]), FAIR)
    assert chosen(judge, [TEXTS["L1"], TEXTS["L2"]]) in {TEXTS["L1"], TEXTS["L2"]}


def test_an_unknown_question_gets_the_same_answer_named_in_every_order():
    judge = Judge(Workload([entry()]), FAIR)
    named = {chosen(judge, list(order), number=77) for order in permutations(TEXTS.values())}
    assert len(named) == 1


def test_position_bias_names_the_first_answer_with_its_probability():
    workload = Workload([entry(number, preferred="L2") for number in range(1500)])
    judge = Judge(workload, JudgeRules(position_bias=0.25))
    verdicts = [judge.verdict(prompt(*TEXTS.values(), number=number)) for number in range(1500)]
    assert verdicts.count("A") / 1500 == pytest.approx(0.25, abs=0.035)
    assert verdicts.count("A") + verdicts.count("C") == 1500


def test_balanced_orders_cancel_the_bias():
    workload = Workload([entry(number, preferred="L2") for number in range(400)])
    judge = Judge(workload, JudgeRules(position_bias=0.3))
    counts = dict.fromkeys(TEXTS.values(), 0)
    for number in range(400):
        for shift in range(3):
            answers = [*list(TEXTS.values())[shift:], *list(TEXTS.values())[:shift]]
            counts[chosen(judge, answers, number=number)] += 1
    assert counts[TEXTS["L0"]] / 1200 == pytest.approx(0.1, abs=0.03)
    assert counts[TEXTS["L1"]] / 1200 == pytest.approx(0.1, abs=0.03)


def test_some_verdicts_can_be_unparseable():
    workload = Workload([entry(number) for number in range(1000)])
    judge = Judge(workload, JudgeRules(unparseable=0.1))
    verdicts = [judge.verdict(prompt(*TEXTS.values(), number=number)) for number in range(1000)]
    assert verdicts.count(NO_VERDICT) / 1000 == pytest.approx(0.1, abs=0.03)


def test_a_verdict_is_one_token_and_its_energy_grows_with_the_prompt():
    judge = Judge(Workload([entry()]), FAIR)

    def plan(text):
        return judge.plan(GenerationRequest(text=f"<|im_start|>user\n{text}<|im_end|>\n", max_tokens=1))

    short, long = plan(prompt(*TEXTS.values())), plan(prompt(*TEXTS.values(), reference="r" * 4000))
    assert (short.text, short.tokens) == ("B", 1)
    assert long.energy_j - short.energy_j == pytest.approx(0.3 * (long.input_tokens - short.input_tokens))
    assert long.time_s > short.time_s


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"position_bias": 1.2}, "'position_bias'"), ({"unparseable": -0.1}, "'unparseable'"),
     ({"decode_j_per_token": 0.0}, "'decode_j_per_token'")],
)  # fmt: skip
def test_invalid_parameters_are_rejected(rules, message):
    with pytest.raises(ValueError, match=message):
        JudgeRules(**rules)


def test_the_measured_preferences_are_reproduced(measured_data):
    workload = load_workload(measured_data / "llama2_requests.jsonl.gz")
    judge = Judge(workload, FAIR)
    judged = [one for one in workload.entries if one.preferred][:800]
    right = 0
    for one in judged:
        texts = [one.responses["llama-2-13b-chat", level].text or "" for level in ("L0", "L1", "L2")]
        parts = "".join(f"[Answer {letter}]\n{text}\n\n" for letter, text in zip("ABC", texts, strict=True))
        verdict = judge.verdict(
            f"[Question]\n{one.prompt}\n\n{parts}Which answer is best? Reply with one letter only.\n"
        )
        named, wanted = texts["ABC".index(verdict)], texts[["L0", "L1", "L2"].index(one.preferred)]
        right += named.split() == wanted.split()
    assert right == len(judged)


def compared_entry(**worse):
    """The baseline of model `m` at L0 without a verdict, the other answers with one."""
    found = entry(preferred="L0")
    return replace(
        found, responses={key: replace(one, worse=worse.get(key[1])) for key, one in found.responses.items()}
    )


def test_of_a_pair_with_the_baseline_the_recorded_comparison_decides():
    judge = Judge(Workload([compared_entry(L1=False, L2=True)]), FAIR)
    for pair in permutations((TEXTS["L0"], TEXTS["L1"])):
        assert chosen(judge, pair) == TEXTS["L1"]
    for pair in permutations((TEXTS["L0"], TEXTS["L2"])):
        assert chosen(judge, pair) == TEXTS["L0"]
    # Of all three, and of a pair without the baseline, the preferred level decides.
    assert chosen(judge, tuple(TEXTS.values())) == TEXTS["L0"]


def test_a_workload_without_comparisons_is_judged_by_the_preferred_level():
    judge = Judge(Workload([compared_entry()]), FAIR)
    assert chosen(judge, (TEXTS["L1"], TEXTS["L0"])) == TEXTS["L0"]

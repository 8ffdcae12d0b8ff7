"""Inputs of a simulation: invalid ones are rejected by name, and what is left out is reported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local.grid import shipped_trace
from tools.simulator.inputs import Inputs, prepare
from tools.simulator.requests import SimulationInputError
from tools.simulator.schemes import Experiment

LEVELS = ("L0", "L1", "L2")
DRAWS = (
    "hour,sprout_q0,sprout_q1,sprout_q2,model_q13b,static_q0,static_q1,oracle_q0,oracle_q1,oracle_q2",
    "0.4,0.3,0.3,0.6,0.4,0.3,0.4,0.3,0.3",
)
HOURS = 24


def prompt(
    number: int, task: str, *, preferred: str | None = "L1", levels: Sequence[str] = LEVELS, correct: bool | None = True
) -> dict[str, object]:
    """A line of a workload."""
    answer = {"energy_j": 100.0, "time_s": 1.0, "tokens": 10, "correct": correct}
    return {
        "task": task,
        "prompt": f"{task} {number}",
        "preferred": preferred,
        "responses": {f"m/{level}": answer for level in levels},
    }


def prompts(task: str, first: int = 0, count: int = 30, **more: object) -> list[dict[str, object]]:
    return [prompt(number, task, **more) for number in range(first, first + count)]  # type: ignore[arg-type]


def written(path: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def table(path: Path, header: str, row: str, *, hours: Sequence[object] = range(HOURS)) -> Path:
    path.write_text("\n".join([header, *(f"{hour},{row}" for hour in hours)]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Two tasks of thirty judged prompts on the shipped trace."""
    requests = written(tmp_path / "requests.jsonl", prompts("facts") + prompts("sums"))
    return Inputs(requests=requests, carbon=(shipped_trace(),), schemes=("sprout",), xi=(0.1,), hours=HOURS)


def test_learned_groups_follow_the_task_labels_unless_these_are_left_out(inputs, tmp_path):
    """The prompts of both tasks are alike."""
    lines = [prompt(number, "one") | {"task": ("one", "other")[number % 2]} for number in range(400)]
    requests = written(tmp_path / "alike.jsonl", lines)

    def tasks_by_group(*, task_labels: bool) -> list[set[int]]:
        made = replace(inputs, requests=requests, schemes=("sprout_context",), task_labels=task_labels)
        fold = prepare(made, lambda _: None)[0].folds[0]
        assert fold.contexts is not None
        places = zip(fold.contexts.measured.tolist(), fold.measured.task.tolist(), strict=True)
        found: dict[int, set[int]] = {}
        for place, task in places:
            found.setdefault(place, set()).add(task)
        return list(found.values())

    assert all(len(tasks) == 1 for tasks in tasks_by_group(task_labels=True))
    assert any(len(tasks) == 2 for tasks in tasks_by_group(task_labels=False))


def rejection(inputs: Inputs) -> str:
    with pytest.raises(SimulationInputError) as error:
        prepare(inputs, lambda _: None)
    return str(error.value)


def prepared(inputs: Inputs) -> tuple[Experiment, list[str]]:
    said: list[str] = []
    experiment, _ = prepare(inputs, said.append)
    return experiment, said


def test_a_task_with_traffic_and_without_prompts_is_rejected(inputs: Inputs, tmp_path: Path) -> None:
    mix = table(tmp_path / "mix.csv", "hour,facts,sums,poems", "0.25,0.25,0.5")
    assert f"{inputs.requests} (--seed 1) has no prompt of task poems, which has traffic" in rejection(
        replace(inputs, mix=mix)
    )
    mix = table(tmp_path / "mix.csv", "hour,facts,sums", "0.5,0.5")
    learn = written(tmp_path / "learn.jsonl", prompts("facts", 100))
    assert f"{learn} has no prompt of task sums, which has traffic" in rejection(replace(inputs, mix=mix, learn=learn))


def test_a_task_that_only_one_half_has_is_rejected(inputs: Inputs) -> None:
    written(inputs.requests, [*prompts("facts"), prompt(0, "sums")])
    assert "has no prompt of task sums, which has traffic: add prompts of it, take another --seed" in rejection(inputs)


def test_every_prompt_is_measured_on_once_and_never_learned_from_by_then(inputs: Inputs) -> None:
    experiment, _ = prepared(replace(inputs, folds=3))
    everything, _ = prepared(replace(inputs, learn=inputs.requests))
    assert len(experiment.folds) == 3
    assert sorted(experiment.measured.prompts) == sorted(everything.measured.prompts)
    for fold in experiment.folds:
        assert set(fold.learn.prompts).isdisjoint(fold.measured.prompts)
        assert len(fold.learn) + len(fold.measured) == len(everything.measured)


def test_two_folds_begin_with_the_halves(inputs: Inputs) -> None:
    halves, folds = (prepared(replace(inputs, folds=folds))[0] for folds in (None, 2))
    assert halves.folds[0].learn.prompts == folds.folds[0].learn.prompts == folds.folds[1].measured.prompts


def test_folds_and_prompts_to_learn_from_exclude_each_other(inputs: Inputs) -> None:
    assert "leave it out with --learn" in rejection(replace(inputs, folds=2, learn=inputs.requests))
    assert "and with --variant published" in rejection(replace(inputs, folds=2, variant="published"))


def test_a_task_that_a_fold_lacks_is_rejected(inputs: Inputs) -> None:
    written(inputs.requests, [*prompts("facts"), prompt(0, "sums")])
    assert (
        "has no prompt of task sums, which has traffic: add prompts of it, take another --seed or fewer"
        in rejection(replace(inputs, folds=3))
    )


def test_a_task_that_without_traffic_is_left_out_and_reported(inputs: Inputs, tmp_path: Path) -> None:
    mix = table(tmp_path / "mix.csv", "hour,poems,facts,sums", "0,1,0")
    experiment, said = prepared(replace(inputs, mix=mix))
    assert experiment.measured.tasks == experiment.folds[0].learn.tasks == ("facts",)
    assert experiment.mix.shape == (HOURS, 1)
    assert "left out task poems, sums with all prompts: no share in any simulated hour" in said


def test_a_task_on_which_quality_cannot_be_measured_is_rejected(inputs: Inputs) -> None:
    written(inputs.requests, prompts("facts") + prompts("sums", preferred=None))
    assert "has no judged prompt of task sums, which has traffic: quality cannot be measured" in rejection(inputs)


def test_a_task_without_judged_prompts_to_learn_from_is_reported(inputs: Inputs, tmp_path: Path) -> None:
    learn = written(tmp_path / "learn.jsonl", prompts("facts", 100) + prompts("sums", 100, preferred=None))
    _, said = prepared(replace(inputs, learn=learn))
    assert f"{learn} has no judged prompt of task sums: the evaluator learns nothing on it" in said


def test_a_preferred_level_that_nobody_measured_is_rejected(inputs: Inputs) -> None:
    written(inputs.requests, [*prompts("facts"), prompt(0, "sums", preferred="L7")])
    assert rejection(inputs).startswith(
        f"{inputs.requests}, line 31: 'preferred' is 'L7', at which 'm' was not measured; its levels are L0, L1, L2"
    )


def test_lines_left_out_of_learn_and_prompts_that_are_not_fresh_are_reported(inputs: Inputs, tmp_path: Path) -> None:
    learn = written(tmp_path / "learn.jsonl", [*prompts("facts", 20), *prompts("sums", 100), {"task": "sums"}])
    _, said = prepared(replace(inputs, learn=learn))
    assert any(line.startswith(f"left out {learn}, line 61: 'prompt' must be a text") for line in said)
    assert any(line.startswith(f"10 of 60 prompts of {inputs.requests} are in --learn {learn} too") for line in said)


def test_other_levels_or_tasks_to_learn_from_are_rejected(inputs: Inputs, tmp_path: Path) -> None:
    learn = written(tmp_path / "learn.jsonl", prompts("facts", levels=("L0", "L1")))
    assert rejection(replace(inputs, learn=learn)) == (
        f"--learn {learn} has 'm' at L0, L1, {inputs.requests} at L0, L1, L2: both need the same levels"
    )
    written(learn, prompts("poems"))
    assert rejection(replace(inputs, learn=learn)).startswith(f"--learn {learn}: prompts of poems have no place")


def test_a_second_model_that_only_the_requests_have_is_rejected(inputs: Inputs, tmp_path: Path) -> None:
    learn = written(tmp_path / "learn.jsonl", prompts("facts", 100) + prompts("sums", 100))
    lines = prompts("facts") + prompts("sums")
    for line in lines:
        line["responses"]["small/L0"] = line["responses"]["m/L0"]  # type: ignore[index]
    written(inputs.requests, lines)
    message = rejection(replace(inputs, learn=learn, schemes=("model_opt",)))
    assert message.startswith(f"--learn {learn} lacks the second model that scheme model_opt needs")


@pytest.mark.parametrize(
    ("row", "hours", "message"),
    [
        (DRAWS[1].replace("0.6", "nan"), range(HOURS), "line 2: 'model_q13b' must be a share from 0 to 1, got 'nan'"),
        (DRAWS[1].replace("0.6", "1.6"), range(HOURS), "line 2: 'model_q13b' must be a share from 0 to 1, got '1.6'"),
        (DRAWS[1], range(1, HOURS + 1), "line 2: 'hour' must be 0, got '1'"),
        (DRAWS[1], [0, *range(HOURS - 1)], "line 3: 'hour' must be 1, got '0'"),
        (DRAWS[1], ["noon", *range(1, HOURS)], "line 2: 'hour' must be 0, got 'noon'"),
    ],
)
def test_draws_of_quality_that_are_no_shares_by_hour_are_rejected(
    inputs: Inputs, tmp_path: Path, row: str, hours: Sequence[object], message: str
) -> None:
    draws = table(tmp_path / "draws.csv", DRAWS[0], row, hours=hours)
    assert f"{draws}, {message}" in rejection(replace(inputs, variant="published", quality_draws=draws))


def test_a_mix_whose_hours_are_out_of_order_is_rejected(inputs: Inputs, tmp_path: Path) -> None:
    mix = table(tmp_path / "mix.csv", "hour,facts,sums", "0.5,0.5", hours=[0, 1, 3, 2, *range(4, HOURS)])
    assert f"{mix}, line 4: 'hour' must be 2, got '3'; give one row for every hour" in rejection(
        replace(inputs, mix=mix)
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "CONFIDENCE_Z_BY_METRIC",
            "{correctness",
            "SPROUT_OPTIMIZER_CONFIDENCE_Z_BY_METRIC is not JSON of the expected form",
        ),
        (
            "CONFIDENCE_Z_BY_METRIC",
            '{"correctness": "x"}',
            "SPROUT_OPTIMIZER_CONFIDENCE_Z_BY_METRIC: Input should be a valid",
        ),
        ("WINDOW_H", "-1", "SPROUT_OPTIMIZER_WINDOW_H: Input should be greater than 0"),
        ("FLOORS", '{"tone": 0.5}', "SPROUT_OPTIMIZER_FLOORS names tone"),
    ],
)
def test_a_setting_of_the_optimizer_that_is_invalid_is_named(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"SPROUT_OPTIMIZER_{name}", value)
    assert message in rejection(inputs)


def test_the_published_variant_needs_three_levels(inputs: Inputs) -> None:
    written(inputs.requests, prompts("facts", levels=("L0", "L1")))
    assert rejection(replace(inputs, variant="published")).startswith(
        "--variant published needs a model measured at 3 levels; 'm' was at L0, L1: name another with --model"
    )


def test_a_bound_of_correctness_that_nobody_can_check_is_rejected(inputs: Inputs, tmp_path: Path) -> None:
    learn = written(tmp_path / "learn.jsonl", prompts("facts", 100, correct=None) + prompts("sums", 100, correct=None))
    message = rejection(replace(inputs, learn=learn, xi_correctness=0.1))
    assert message.startswith(f"--xi-correctness: {learn} has no judged prompt with 'correct' at every level")
    written(inputs.requests, prompts("facts", correct=None))
    message = rejection(replace(inputs, xi_correctness=0.1))
    assert "has no prompt with 'correct' at every level: it cannot be checked" in message


def test_a_constant_bound_needs_to_know_what_may_be_lost(inputs: Inputs) -> None:
    message = rejection(replace(inputs, constant_correctness=True))
    assert message == "--constant-correctness needs --xi-correctness: how much may be lost in every hour"
    experiment, _ = prepared(replace(inputs, constant_correctness=True, xi_correctness=0.1))
    assert experiment.constant_bounds == {"correctness"}


def test_schemes_that_no_bound_of_correctness_binds_are_reported(inputs: Inputs) -> None:
    _, said = prepared(replace(inputs, schemes=("base", "sprout", "oracle"), xi_correctness=0.1))
    assert "--xi-correctness does not bind base, oracle: they have no such bound" in said


def trace_without(path: Path, *hours: int) -> Path:
    """The shipped trace, some of whose rows are gone."""
    header, *rows = shipped_trace().read_text(encoding="utf-8").splitlines()
    kept = [row for hour, row in enumerate(rows) if hour not in hours]
    path.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
    return path


def test_hours_missing_in_the_past_that_is_looked_back_on_are_reported(inputs: Inputs, tmp_path: Path) -> None:
    trace = trace_without(tmp_path / "trace.csv", 10, 11, 200)
    _, said = prepared(replace(inputs, carbon=(trace,), windows=(100,), schemes=("sprout", "oracle")))
    whole, trailing = [line for line in said if "no value" in line]
    assert whole.startswith("zone SAMPLE-SOLAR: 3 of the trace's 240 hours have no value")
    assert trailing.startswith("zone SAMPLE-SOLAR: 2 of the 100 hours before hour 100 have no value")
    _, said = prepared(replace(inputs, carbon=(trace,), windows=(100,), variant="published"))
    assert ["3 of the trace's 240" in line for line in said if "no value" in line] == [True]


def test_a_scheme_that_is_solved_once_needs_past_values(inputs: Inputs, tmp_path: Path) -> None:
    lines = shipped_trace().read_text(encoding="utf-8").splitlines()
    for place in range(1, 101):
        cells = lines[place].split(",")
        cells[4] = ""
        lines[place] = ",".join(cells)
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    once = replace(
        inputs, carbon=(tmp_path / "trace.csv",), windows=(100,), variant="published", schemes=("sprout_sta",)
    )
    assert "none of the 100 hours before hour 100 has a value" in rejection(once)
    prepare(replace(once, schemes=("sprout",)), lambda _: None)


def test_prompts_to_learn_from_that_the_published_protocol_ignores_are_reported(inputs: Inputs, tmp_path: Path) -> None:
    learn = written(tmp_path / "learn.jsonl", prompts("facts", 100) + prompts("sums", 100))
    _, said = prepared(replace(inputs, variant="published", learn=learn))
    assert any(line.startswith("--learn is ignored") for line in said)

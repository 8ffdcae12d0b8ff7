"""`sprout policy explain`: the program of a policy, its binding constraints and shadow prices."""

import asyncio
import json
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from typer.testing import CliRunner

from services.optimizer.bounds import CurrentIntensity, TrailingRange
from services.optimizer.estimates import Estimates
from services.optimizer.policy import Situation, make_policy, problem_of
from services.optimizer.prior import load_priors
from services.optimizer.program import solve
from services.optimizer.promise import ExpectedHours, Period, RestOfPeriod
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet
from shared.messages import OptionEstimate, PeriodAccount, Policy, PoolPrice
from shared.runtime.settings import KafkaSettings
from tests.support.fleets import MODEL, fleet_toml
from tools.cli import policy as policy_command
from tools.cli.explanation import explain_policy
from tools.cli.main import app

FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
ZONE = FLEET.pools[0].zone
NOW = datetime(2026, 1, 1, tzinfo=UTC)
METRIC = "preference"


def row(loss: float) -> dict[str, OptionEstimate]:
    def cell(energy_kwh: float, quality: float, **more: Any) -> OptionEstimate:
        return OptionEstimate(energy_kwh=energy_kwh, processing_s=1.0, quality={METRIC: quality}, **more)

    return {"p/L0": cell(1e-4, 0.5), "p/L1": cell(4e-5, 0.5 - loss, doubt={METRIC: (0.02, 0.01, 0.01)})}


def made(
    *,
    groups: bool = True,
    names: tuple[str, str] = ("sums", "facts"),
    fleet: Fleet = FLEET,
    rest: RestOfPeriod | None = None,
    **settings: Any,
) -> Policy:
    """A policy of two groups, or of none; brief answers lose more in the first group."""
    first, second = names
    estimates = Estimates(
        weights={first: 0.25, second: 0.75} if groups else {},
        groups={first: row(0.08), second: row(0.04)} if groups else {},
        overall=row(0.05),
        requests_per_s=1.0,
    )
    situation = Situation(
        model=MODEL,
        now=NOW,
        trigger="start",
        intensities={ZONE: CurrentIntensity(300.0, NOW)},
        range=TrailingRange(100.0, 300.0),
        estimates=estimates,
        rest=rest,
    )
    return make_policy(situation, fleet=fleet, settings=OptimizerSettings(**settings), version=7)[0]


def by_period(**settings: Any) -> Policy:
    """A policy of a promise by period, a day and a half into the week."""
    week = Period.at(NOW, days=7)
    account = PeriodAccount(start=week.start, end=week.end, requests=1e4, promised={METRIC: 0.95}, kept={METRIC: 0.94})
    rest = RestOfPeriod(
        current=account,
        previous=account.model_copy(update={"start": week.before().start, "end": week.start}),
        bounds={METRIC: 0.955},
        later=(
            ExpectedHours(share=0.5, g_per_kwh={ZONE: 100.0}),
            ExpectedHours(share=0.4, g_per_kwh={ZONE: 400.0}),
        ),
    )
    return made(rest=rest, promise="period", xi={METRIC: 0.1}, **settings)


def run(*arguments: str, **env: str):
    return CliRunner().invoke(app, ["policy", "explain", *arguments], env=env)


def written(path: Path, found: Policy) -> str:
    path.write_text(found.model_dump_json(), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"groups": False},
        {"floors": {METRIC: 0.95}},
        {"xi": {METRIC: 0.0}},
        {"xi": {METRIC: 1.0}, "holdout": 0.2},
    ],
)
def test_the_rebuilt_program_has_the_solution_of_the_policy(settings):
    found = made(**settings)
    solution = solve(problem_of(Policy.model_validate_json(found.model_dump_json())))
    assert solution.status == found.status
    assert solution.g_per_request == pytest.approx(found.expected_g_per_request, rel=1e-9)
    assert solution.quality == pytest.approx(found.expected_quality)
    if found.groups:
        assert solution.rows == {group: pytest.approx(one) for group, one in found.groups.items()}
    assert explain_policy(found).agrees


@pytest.mark.parametrize("floors", [{}, {METRIC: 0.9}])
def test_a_promise_by_period_is_rebuilt_and_explained(tmp_path, floors):
    found = by_period(hourly_floors=floors)
    explanation = explain_policy(Policy.model_validate_json(found.model_dump_json()))
    assert explanation.agrees
    assert explanation.problem.hourly_floors == floors
    (limit,) = explanation.limits
    assert limit.outcome.required == 0.955
    assert limit.slack == pytest.approx(0.0, abs=1e-4)
    result = run(MODEL, "--file", written(tmp_path / "policy.json", found))
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for part in (
        "Promise by period", "2025-12-29", "so far", "closed", "95.00 %", "94.00 %", "of the rest of the period",
        "promise for 2025-12-29 to 2026-01-05", "0.940 kept of 0.950 so far, 0.900 for this hour, at least 0.955",
    ):  # fmt: skip
        assert part in text
    as_json = json.loads(run(MODEL, "--json", "--file", written(tmp_path / "policy.json", found)).stdout)
    assert as_json["promise"]["rest"] == {METRIC: 0.955}


def test_a_prior_for_another_fleet_is_written(tmp_path, monkeypatch):
    (tmp_path / "fleet.toml").write_text(fleet_toml(["h:1"]))
    monkeypatch.setenv("SPROUT_FLEET_FILE", str(tmp_path / "fleet.toml"))
    file, prior = written(tmp_path / "policy.json", made()), tmp_path / "prior.json"
    result = CliRunner().invoke(app, ["policy", "export-prior", str(prior), "--file", file])
    assert result.exit_code == 0, result.output
    found = load_priors(prior, FLEET)[MODEL]
    assert found.quality["sums"][METRIC]["p/L1"].mean == pytest.approx(0.42)
    assert found.quality["sums"][METRIC]["p/L1"].standard_error == pytest.approx(0.0245, abs=1e-4)
    monkeypatch.setenv("SPROUT_FLEET_FILE", str(tmp_path / "none.toml"))
    refused = CliRunner().invoke(app, ["policy", "export-prior", str(prior), "--file", file])
    assert (refused.exit_code, "SPROUT_FLEET_FILE" in refused.output) == (1, True)


def test_it_explains_limits_prices_and_probabilities(tmp_path):
    found = made()
    file = written(tmp_path / "policy.json", found)
    result = run(MODEL, "--file", file)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert f"policy 7 of {MODEL}: optimal" in text
    assert found.reason in text
    assert "bound[preference]: one point more preference costs" in text
    assert "of carbon" in text
    for group, share in (("sums", "25.0 %"), ("facts", "75.0 %")):
        line = next(line for line in result.stdout.splitlines() if group in line and share in line)
        assert f"{100 * found.groups[group].get('p/L0', 0.0):.1f} %" in line
    assert "other groups" in text


def test_it_says_why_an_option_is_not_used(tmp_path):
    found = made(xi={METRIC: 0.05}, holdout=0.0)
    choices = explain_policy(found).choices
    unused, extra_g = choices["sums"]["p/L1"], choices["sums"]["p/L1"].extra_g
    assert "p/L1" not in found.groups["sums"]
    assert 0.0 < found.groups["facts"]["p/L1"] < 1.0
    assert choices["facts"]["p/L1"].extra_g == pytest.approx(0.0, abs=1e-9)
    assert unused.quality == {METRIC: pytest.approx(0.84)}
    assert extra_g is not None
    assert extra_g > 0.0
    # It would be used if a request emitted so much less.
    problem = problem_of(found)
    for share, used in ((0.98, False), (1.02, True)):
        cheaper = dict(problem.estimates["sums"])
        less_kwh = share * extra_g / problem.options["p/L1"].g_per_kwh
        cheaper["p/L1"] = cheaper["p/L1"].model_copy(update={"energy_kwh": cheaper["p/L1"].energy_kwh - less_kwh})
        rows = solve(replace(problem, estimates={**problem.estimates, "sums": cheaper})).rows
        assert ("p/L1" in rows["sums"]) is used
    file = written(tmp_path / "policy.json", found)
    line = next(line for line in run(MODEL, "--file", file).stdout.splitlines() if "p/L1" in line and "84.0 %" in line)
    assert f"{extra_g:.2g} g" in line
    assert json.loads(run(MODEL, "--json", "--file", file).stdout)["choices"]["sums"]["p/L1"]["extra_g"] == extra_g


def test_it_shows_what_a_token_costs_and_why(tmp_path):
    price = PoolPrice(
        basis="marginal", batch=12.5, token_j=0.0379, prompt_token_j=0.01, meter_token_j=0.31, reason="servers run on"
    )
    unknown = PoolPrice(basis="attributed", reason="no power curve")
    found = made()
    found = found.model_copy(
        update={"inputs": found.inputs.model_copy(update={"prices": {"p": price, "[/q]": unknown}})}
    )
    file = written(tmp_path / "policy.json", found)
    shown = " ".join(run(MODEL, "--file", file).stdout.split())
    parts = ("marginal", "servers", "run on", "12.5", "0.0379 J", "0.01 J", "0.31 J", "[/q]", "attributed", "no power")
    assert [part for part in parts if part not in shown] == []
    assert json.loads(run("--file", file, "--json").stdout)["prices"]["p"]["basis"] == "marginal"
    assert "Energy of a token" not in run("--file", written(tmp_path / "older.json", made())).stdout


def test_the_shadow_price_is_the_cost_of_a_stricter_limit():
    found = made(confidence_z=1.0)
    explanation = explain_policy(found)
    (limit,) = explanation.limits
    stricter = solve(replace(problem_of(found), bounds={METRIC: found.bounds[METRIC] + 0.001}))
    points = 100.0 * (stricter.g_per_request - found.expected_g_per_request) / found.reference_g_per_request
    assert limit.outcome.carbon_points_per_point == pytest.approx(points / 0.1, rel=0.05)
    assert limit.outcome.mean - limit.outcome.margin == pytest.approx(found.expected_quality[METRIC])
    assert limit.slack == pytest.approx(0.0, abs=2e-5)


def test_as_json_it_has_the_same_figures(tmp_path):
    found = made(floors={METRIC: 0.95}, holdout=0.1)
    result = run("--file", written(tmp_path / "policy.json", found), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["probabilities"]["sums"] == pytest.approx(found.groups["sums"])
    assert document["rebuilt_g_per_request"] == pytest.approx(found.expected_g_per_request)
    assert document["limits"][0]["required"] == pytest.approx(0.9)
    named = {one["constraint"]: one["meaning"] for one in document["binding"]}
    assert named["floor[preference,sums]"].startswith("one point more preference in group sums costs")


def test_the_program_can_be_printed(tmp_path):
    result = run("--file", written(tmp_path / "policy.json", made()), "--lp")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("\\* sprout *\\\nMinimize\nOBJ: ")
    assert "bound_preference_: " in result.stdout
    assert "cut_preference,0_: " in result.stdout


def test_a_policy_that_serves_the_reference_is_explained(tmp_path):
    alone = {"p/L0": OptionEstimate(energy_kwh=1e-4, processing_s=1.0, quality={})}
    found = made().model_copy(deep=True)
    inputs = found.inputs.model_copy(update={"estimates": {"sums": alone, "facts": alone}})
    served = {"p/L0": 1.0}
    found = found.model_copy(
        update={"inputs": inputs, "groups": {"sums": served, "facts": served}, "status": "reference"}
    )
    result = run("--file", written(tmp_path / "policy.json", found))
    assert result.exit_code == 0, result.output
    assert "no constraint is binding" in result.stdout
    assert "no program" in run("--file", str(tmp_path / "policy.json"), "--lp").stdout


def test_settled_groups_are_marked(tmp_path):
    file = written(tmp_path / "policy.json", made())
    assert "settled since" not in run("--file", file).stdout
    since = datetime(2024, 2, 3, 4, 5, tzinfo=UTC)
    file = written(tmp_path / "policy.json", made().model_copy(update={"settled": {"facts": since}}))
    shown = run("--file", file).stdout
    assert "settled since" in shown
    assert shown.count("2024-02-03 04:05") == 1
    assert json.loads(run("--file", file, "--json").stdout)["settled"] == {"facts": since.isoformat()}


def test_a_policy_of_the_first_release_takes_prices_from_the_fleet_file(tmp_path, monkeypatch):
    found = made()
    document = json.loads(found.model_dump_json())
    for name in ("options", "floors", "capacities", "requests_per_s"):
        del document["inputs"][name]
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    failed = run("--file", str(file), SPROUT_FLEET_FILE=str(tmp_path / "none.toml"))
    assert failed.exit_code == 1
    assert "does not contain the prices of its options" in failed.stderr
    assert "SPROUT_FLEET_FILE" in failed.stderr
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml(["h:1"]), encoding="utf-8")
    result = run("--file", str(file), "--json", SPROUT_FLEET_FILE=str(fleet))
    assert json.loads(result.stdout)["rebuilt_g_per_request"] == pytest.approx(found.expected_g_per_request)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-is-an-argument",), "No such option"),
        (("other",), "has no policy of model 'other'"),
        (("--version", "3"), "has no version 3 of the policy"),
    ],
)
def test_a_policy_that_does_not_exist_is_named(tmp_path, arguments, message):
    result = run(*arguments, "--file", written(tmp_path / "policy.json", made()))
    assert result.exit_code in (2, 3)
    assert message in " ".join(result.stderr.split())


def test_a_file_that_is_no_policy_is_rejected(tmp_path):
    file = tmp_path / "policy.json"
    file.write_text("{}", encoding="utf-8")
    assert "is not a policy" in run("--file", str(file)).stderr
    assert "cannot be read" in run("--file", str(tmp_path / "none.json")).stderr


def test_of_several_policies_the_newest_of_the_model_is_explained(monkeypatch):
    async def read(_kafka) -> list[Policy]:
        return [made(), made().model_copy(update={"version": 9}), made().model_copy(update={"model": "other"})]

    monkeypatch.setattr(policy_command, "read_policies", read)
    result = run(MODEL, "--json", "--bootstrap", "127.0.0.1:1")
    assert json.loads(result.stdout)["version"] == 9
    assert json.loads(run(MODEL, "--version", "7", "--json", "--bootstrap", "127.0.0.1:1").stdout)["version"] == 7
    ambiguous = run("--bootstrap", "127.0.0.1:1")
    assert ambiguous.exit_code == 1
    assert f"name one: {MODEL}, other" in ambiguous.stderr


@pytest.mark.parametrize("hostile", ["[/sums]", "[red]x", "[link=http://example.com]x[/link]", "sums[/]"])
def test_a_group_name_is_not_parsed_as_markup(tmp_path, hostile):
    found = made(names=(hostile, "facts"), floors={METRIC: 0.95})
    result = run("--file", written(tmp_path / "policy.json", found))
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if hostile in line and "25.0 %" in line)
    assert f"{100 * found.groups[hostile].get('p/L0', 0.0):.1f} %" in line
    assert f"in group {hostile} costs" in result.stdout


def test_control_characters_of_a_group_name_are_replaced(tmp_path):
    found = made(names=("\x1b[2Jsums\r\n\x9b1m", "facts"), floors={METRIC: 0.95})
    result = run("--file", written(tmp_path / "policy.json", found))
    assert result.exit_code == 0, result.output
    assert not set(result.stdout) & {"\x1b", "\r", "\x9b"}
    assert "\N{REPLACEMENT CHARACTER}[2Jsums" in result.stdout


def test_an_inconsistent_policy_is_no_question_of_the_fleet_file(tmp_path):
    document = json.loads(made().model_dump_json())
    document["inputs"]["weights"]["sums"] = 0.5
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    failed = run("--file", str(file))
    assert failed.exit_code == 1
    assert "the policy message is inconsistent: weights must sum to 1" in failed.stderr
    assert "SPROUT_FLEET_FILE" not in failed.stderr


class ConsumerWithoutRecords:
    """A consumer of two partitions; the second has no leader and sends nothing."""

    def __init__(self, **_options: Any) -> None:
        self.stopped = False
        created.append(self)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.stopped = True

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 3)

    def assign(self, partitions: list[TopicPartition]) -> None: ...

    async def seek_to_beginning(self, *partitions: TopicPartition) -> None: ...

    async def getmany(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        await asyncio.sleep(0.001)
        return {}

    async def position(self, partition: TopicPartition) -> int:
        return 3 if partition.partition == 0 else 1


created: list[ConsumerWithoutRecords] = []


async def test_reading_ends_if_a_partition_sends_no_records(monkeypatch):
    async def partitions(_kafka: KafkaSettings, topics: list[str]) -> list[TopicPartition]:
        return [TopicPartition(topics[0], 0), TopicPartition(topics[0], 1)]

    monkeypatch.setattr(policy_command, "existing_partitions", partitions)
    monkeypatch.setattr(policy_command, "AIOKafkaConsumer", ConsumerWithoutRecords)
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    with pytest.raises(policy_command.ReadTimeoutError, match=r"within 0\.05 s: .*partition 1 "):
        await policy_command.read_policies(kafka, timeout_s=0.05)
    assert created.pop().stopped


def test_a_timeout_has_its_own_exit_code_and_remedy(monkeypatch):
    async def read(_kafka) -> list[Policy]:
        raise policy_command.ReadTimeoutError("topic sprout.policies could not be read to its end within 30 s")

    monkeypatch.setattr(policy_command, "read_policies", read)
    result = run("--bootstrap", "127.0.0.1:1")
    assert result.exit_code == 4
    assert "could not be read to its end" in result.stderr
    assert "leader" in result.stderr

"""A prior from an earlier fleet: export, what it counts as, and files that are refused."""

import json
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from services.optimizer.bounds import CurrentIntensity, TrailingRange
from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.estimates import Estimates, estimate
from services.optimizer.policy import Situation, make_policy
from services.optimizer.prior import ModelPrior, PriorError, PriorFile, export_prior, load_priors
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.fleet import Fleet
from shared.messages import EvaluationCost, Policy, Quality, QualityCount
from tests.support.grouping import NOW
from tests.support.router import MODEL, ZONE, fleet_toml

FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
SETTINGS = OptimizerSettings(holdout=0.0)
REFERENCE = "p/L0"
KWH = {"p/L0": 1e-4, "p/L1": 5e-5, "p/L2": 2e-5}
QUALITY = {"qa": (0.3, 0.4, 0.3), "code": (0.6, 0.3, 0.1)}
NO_COST = EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0.0)


def consumption(*, scale: float = 1.0, options=tuple(KWH), requests: float = 500.0) -> Consumption:
    found = Consumption()
    for group in QUALITY:
        for option in options:
            used = ResourceUse(requests, requests * scale * KWH[option], requests)
            found.add(group, option, used, at_s=NOW.timestamp(), settings=SETTINGS, traffic=requests)
    return found


def verdicts(trials: float, quality=QUALITY, settings: OptimizerSettings = SETTINGS) -> QualityCounts:
    counts = tuple(
        QualityCount(group=group, option=option, metric="preference", successes=trials * share, trials=trials)
        for group, row in quality.items()
        for option, share in zip(KWH, row, strict=True)
    )
    evaluation = Quality(
        evaluation_id="e", model=MODEL, evaluated_at=NOW, trigger="first", counts=counts, prompts=1, abstentions=0,
        cost=NO_COST,
    )  # fmt: skip
    return QualityCounts([evaluation] if trials else [], settings=settings)


def estimated(used: Consumption, judged: QualityCounts, prior: ModelPrior | None = None) -> Estimates:
    found = estimate(
        used,
        judged,
        options=FLEET.options_of(MODEL),
        reference=REFERENCE,
        settings=SETTINGS,
        now_s=NOW.timestamp(),
        prior=prior,
    )
    assert found is not None
    return found


def earlier_policy(*, trials: float = 400.0, group_version: str | None = None) -> Policy:
    situation = Situation(
        model=MODEL,
        now=NOW,
        trigger="start",
        intensities={ZONE: CurrentIntensity(300.0, NOW)},
        range=TrailingRange(100.0, 500.0),
        estimates=estimated(consumption(), verdicts(trials)),
        group_version=group_version,
    )
    return make_policy(situation, fleet=FLEET, settings=SETTINGS, version=1)[0]


def exported(**changes: Any) -> ModelPrior:
    found = export_prior(earlier_policy(**changes), FLEET)
    assert found is not None
    return found


def test_a_fleet_that_knows_nothing_may_use_the_options_that_an_earlier_one_knew():
    only_reference = consumption(options=(REFERENCE,))
    assert set(estimated(only_reference, verdicts(0)).ineligible) == {"p/L1", "p/L2"}
    found = estimated(only_reference, verdicts(0), exported())
    assert found.ineligible == {}
    assert found.groups["qa"]["p/L1"].quality["preference"] > found.groups["code"]["p/L1"].quality["preference"]
    more = verdicts(0, settings=SETTINGS.model_copy(update={"prior_requests": 500.0}))
    sure = estimated(only_reference, more, exported())
    assert sure.groups["qa"]["p/L1"].doubt["preference"] < found.groups["qa"]["p/L1"].doubt["preference"]


def test_only_the_ratios_of_energy_are_taken_over():
    other_servers = consumption(scale=3.0, options=(REFERENCE,))
    row = estimated(other_servers, verdicts(0), exported()).groups["qa"]
    assert row[REFERENCE].energy_kwh == pytest.approx(3e-4, rel=0.05)
    assert row["p/L2"].energy_kwh / row[REFERENCE].energy_kwh == pytest.approx(0.2, rel=0.1)


def test_evidence_of_the_fleet_itself_outweighs_the_prior():
    turned = {"qa": (0.1, 0.1, 0.8), "code": (0.1, 0.1, 0.8)}
    known = estimated(consumption(), verdicts(2_000, turned))
    with_prior = estimated(consumption(), verdicts(2_000, turned), exported())
    for group, row in known.groups.items():
        for option, one in row.items():
            assert with_prior.groups[group][option].quality["preference"] == pytest.approx(
                one.quality["preference"], abs=0.02
            )


def test_an_uncertain_prior_counts_as_fewer_prompts_and_learned_groups_count_as_one():
    sure, unsure = (exported(trials=trials).outcomes("preference", 1_000.0) for trials in (5_000.0, 30.0))
    assert sure["qa"]["p/L1"].trials == pytest.approx(500.0)
    assert unsure["qa"]["p/L1"].trials < 60.0
    learned = exported(group_version="v1")
    assert list(learned.quality) == ["*"]
    assert learned.quality["*"]["preference"]["p/L1"].mean == pytest.approx(0.35, abs=0.03)


def test_a_policy_that_knows_the_reference_only_has_no_prior():
    assert export_prior(earlier_policy(trials=0.0), FLEET) is None


def test_a_file_is_read_back(tmp_path: Path):
    path = tmp_path / "prior.json"
    path.write_text(PriorFile(models={MODEL: exported()}).model_dump_json())
    assert load_priors(path, FLEET) == {MODEL: exported()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.update(version=2), "not a prior of version 1: version"),
        (lambda file: file.update(extra=1), "not a prior of version 1: extra"),
        (lambda file: file.update(models={}), "models: Dictionary should have at least 1 item"),
        (lambda file: file["models"].update(other=file["models"].pop(MODEL)), "the fleet has no model 'other'"),
        (lambda file: file["models"][MODEL]["directives"].update(L1="In one word."), "level L1 .* another directive"),
        (lambda file: file["models"][MODEL]["costs"].update({"q/L9": {"energy_kwh": 1, "processing_s": 1}}), "q/L9"),
        (lambda file: file["models"][MODEL]["costs"]["p/L1"].update(energy_kwh=0), "energy_kwh: Input should be gre"),
        (lambda file: file["models"][MODEL].update(reference="p/L1"), "relative to 'p/L1', the baseline of"),
        (lambda file: file["models"][MODEL]["costs"].pop(REFERENCE), "no costs of the reference"),
        (lambda file: file["models"][MODEL]["quality"]["qa"]["preference"]["p/L1"].update(mean=1.5), "mean: Input"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change, message: str):
    document = json.loads(PriorFile(models={MODEL: exported()}).model_dump_json())
    change(document)
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(document))
    with pytest.raises(PriorError, match=message):
        load_priors(path, FLEET)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path):
    with pytest.raises(PriorError, match="cannot be read: No such file"):
        load_priors(tmp_path / "none.json", FLEET)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PriorError, match="Invalid JSON"):
        load_priors(tmp_path / "broken.json", FLEET)


def test_the_prior_is_not_forgotten():
    only_reference = consumption(options=(REFERENCE,))
    later = NOW + timedelta(days=365)
    found = estimate(
        only_reference,
        verdicts(0),
        options=FLEET.options_of(MODEL),
        reference=REFERENCE,
        settings=SETTINGS,
        now_s=later.timestamp(),
        prior=exported(),
    )
    assert found is not None
    assert found.ineligible == {}

"""The schemes by name: which world each lives in, what it may choose among, and how it decides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from services.optimizer.settings import OptimizerSettings
from tools.simulator import published
from tools.simulator.case import PublishedCase
from tools.simulator.draws import QualityDraws
from tools.simulator.errors import SimulationInputError
from tools.simulator.grid import Window
from tools.simulator.judging import JudgeCost, LevelJudge, ModelJudge
from tools.simulator.measured import Floats, Ints, Measured, joined
from tools.simulator.oracle import oracle
from tools.simulator.outcome import Outcome
from tools.simulator.production import Operation, ProductionCase, Rule, simulate
from tools.simulator.world import CORRECTNESS, PREFERENCE, world_of_levels, world_of_models

Variant = Literal["production", "published"]
VARIANTS: tuple[Variant, ...] = ("production", "published")

SCHEMES: Mapping[str, str] = {
    "base": "only the reference",
    "co2_opt": "the level of least carbon, whatever its quality",
    "model_opt": "a larger and a smaller model, no directives",
    "sprout_sta": "the program with one prompt group, solved once",
    "sprout": "the program with one prompt group, every hour",
    "sprout_task": "the program with the producers' task labels as prompt groups",
    "sprout_context": "the program with prompt groups learned from the prompts",
    "oracle": "the upper bound: every request's own energy and preferred level are known",
}
DEFAULT_SCHEMES = tuple(name for name in SCHEMES if name != "sprout_task")

STUDY_PROMPTS_OF_MODELS = 1_000
"""Judged before the first hour where two models are compared, of whose verdicts the shares alone are known."""


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """Prompt groups, and where the prompts lie.

    Attributes:
        learn: group of every prompt that may be learned from, as a grouping would say that had not seen it.
        measured: group of every prompt that results are measured on.
        families: of groups that are about alike things, by group; null: all are of one.
    """

    names: tuple[str, ...]
    learn: Ints
    measured: Ints
    families: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Prompts to measure on, and others to learn from.

    Attributes:
        contexts: groups learned from the latter; null where no scheme needs them.
    """

    learn: Measured
    measured: Measured
    contexts: Grouping | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Study:
    """All that the runs of one invocation share.

    Attributes:
        folds: all prompts that results are measured on, each once; every fold is served by what was learned for it, and
            they are measured as one.
        mix: (hours, tasks).
        constant_bounds: metrics whose loss is tolerated in every hour, not only in the dirtiest.
        draws: of quality, for the published variant.
        large_preferred: by task; null where two models were not compared.
    """

    variant: Variant
    folds: tuple[Fold, ...]
    mix: Floats
    optimizer: OptimizerSettings
    constant_bounds: frozenset[str] = frozenset()
    large_preferred: Floats | None = None
    draws: QualityDraws | None = None
    prompts_per_evaluation: int = 150
    judge: JudgeCost = field(default_factory=JudgeCost)
    seed: int = 1

    @property
    def measured(self) -> Measured:
        """All prompts that results are measured on."""
        return joined([fold.measured for fold in self.folds])


def run(study: Study, scheme: str, window: Window, xi: Mapping[str, float]) -> Outcome:
    """One scheme in one window.

    Raises:
        SimulationInputError: the scheme needs what was not given, or a task is asked that was not measured.
    """
    _require_prompts(study)
    if study.variant == "published":
        return _published(study, scheme, window, xi)
    return _production(study, scheme, window, xi)


def _require_prompts(study: Study) -> None:
    there = np.bincount(study.measured.task, minlength=len(study.measured.tasks)) > 0
    lacking = [study.measured.tasks[task] for task in np.flatnonzero(study.mix.any(axis=0) & ~there)]
    if lacking:
        raise SimulationInputError(
            f"the mix asks for task {', '.join(lacking)}, of which there is no prompt to measure on: add prompts of it "
            "to --requests, try another --seed for the halves, or a mix without it"
        )


def _published(study: Study, scheme: str, window: Window, xi: Mapping[str, float]) -> Outcome:
    decide = published.SCHEMES.get(scheme)
    if decide is None:
        raise SimulationInputError(
            f"scheme {scheme!r} was not published; --variant published has {', '.join(published.SCHEMES)}"
        )
    if CORRECTNESS in xi:
        raise SimulationInputError("--xi-correctness needs --variant production: the published code bounds preference")
    if study.draws is None:
        raise ValueError("the published variant needs draws of quality")
    return decide(
        PublishedCase(window=window, measured=study.measured, mix=study.mix, draws=study.draws, xi=xi[PREFERENCE])
    )


def _production(study: Study, scheme: str, window: Window, xi: Mapping[str, float]) -> Outcome:
    if scheme == "oracle":
        return _oracle(study, window, xi)
    case = _model_opt if scheme == "model_opt" else _of_levels
    return simulate([case(study, fold, scheme, window, xi) for fold in study.folds])


def _of_levels(study: Study, fold: Fold, scheme: str, window: Window, xi: Mapping[str, float]) -> ProductionCase:
    grouping = _GROUPINGS[scheme](fold) if scheme in _GROUPINGS else _one_group(fold)
    return ProductionCase(
        scheme=scheme,
        rule=_RULES[scheme],
        window=window,
        mix=study.mix,
        world=world_of_levels(fold.measured, grouping.measured, grouping.names),
        judge=LevelJudge(
            fold.learn,
            grouping.learn,
            grouping.names,
            study.judge,
            # What was judged before the window was drawn from some such traffic; of hour 0 alone it would be no day's.
            asked=study.mix.mean(axis=0),
            half_life_s=study.optimizer.estimate_rules.quality.half_life_s,
        ),
        families=grouping.families,
        operation=_operation(study, xi),
    )


def _model_opt(study: Study, fold: Fold, scheme: str, window: Window, xi: Mapping[str, float]) -> ProductionCase:
    if study.large_preferred is None:
        raise SimulationInputError("scheme model_opt needs --model-preference: how often the larger model is preferred")
    return ProductionCase(
        scheme=scheme,
        rule="program",
        window=window,
        mix=study.mix,
        world=world_of_models(fold.measured, study.large_preferred),
        judge=ModelJudge(fold.learn, study.large_preferred, study_prompts=STUDY_PROMPTS_OF_MODELS, cost=study.judge),
        # Which of two models is right on a prompt was not measured.
        operation=_operation(study, {PREFERENCE: xi[PREFERENCE]}),
    )


def _oracle(study: Study, window: Window, xi: Mapping[str, float]) -> Outcome:
    """With the true quality of every hour, and the year's range: hindsight is what makes it a bound."""
    judged = study.measured.taken(study.measured.judged)
    # As in `world`: a task without a judged prompt adds nothing at any level.
    shares = np.zeros((len(judged.tasks), len(judged.levels)))
    for task in np.unique(judged.task):
        shares[task] = np.bincount(judged.preferred[judged.task == task], minlength=len(judged.levels))
        shares[task] /= shares[task].sum()
    quality = study.mix @ shares
    halves = np.full(len(study.mix), 0.5)
    draws = QualityDraws(quality, halves, quality[:, :2], quality)
    return oracle(PublishedCase(window=window, measured=study.measured, mix=study.mix, draws=draws, xi=xi[PREFERENCE]))


def _operation(study: Study, xi: Mapping[str, float]) -> Operation:
    return Operation(
        xi=dict(xi),
        constant_bounds=study.constant_bounds,
        optimizer=study.optimizer,
        prompts_per_evaluation=study.prompts_per_evaluation,
        seed=study.seed,
    )


def _one_group(fold: Fold) -> Grouping:
    return Grouping(("all",), np.zeros(len(fold.learn), np.int64), np.zeros(len(fold.measured), np.int64))


def _by_task(fold: Fold) -> Grouping:
    return Grouping(fold.measured.tasks, fold.learn.task, fold.measured.task)


def _learned(fold: Fold) -> Grouping:
    if fold.contexts is None:
        raise ValueError("no groups were learned")
    return fold.contexts


_RULES: Mapping[str, Rule] = {
    "base": "reference",
    "co2_opt": "cheapest",
    "sprout_sta": "program_once",
    "sprout": "program",
    "sprout_task": "program",
    "sprout_context": "program",
}
_GROUPINGS: Mapping[str, Callable[[Fold], Grouping]] = {"sprout_task": _by_task, "sprout_context": _learned}


def without_texts(study: Study) -> Study:
    """The same without what no run needs, so that it travels to other processes quickly."""

    def bare(measured: Measured) -> Measured:
        return replace(measured, prompts=("",) * len(measured))

    folds = tuple(replace(fold, learn=bare(fold.learn), measured=bare(fold.measured)) for fold in study.folds)
    return replace(study, folds=folds)


def names_of(text: str) -> Sequence[str]:
    """Scheme names in a comma-separated list.

    Raises:
        SimulationInputError: one is unknown, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or (unknown := [name for name in names if name not in SCHEMES]):
        raise SimulationInputError(
            f"there is no scheme {', '.join(unknown) if names else text!r}; there are {', '.join(SCHEMES)}"
        )
    return names

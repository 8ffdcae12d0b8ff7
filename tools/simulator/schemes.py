"""The schemes by name: their options, their prompt groups, and how they decide."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from services.evaluator.opportunity import OpportunityRules
from services.optimizer.settings import OptimizerSettings
from tools.simulator import published
from tools.simulator.evaluation import JudgeCost, LevelJudge, ModelJudge
from tools.simulator.grid import Window
from tools.simulator.operation import DEFAULT_REQUESTS_PER_HOUR, Operation, ProductionCase, Rule
from tools.simulator.outcome import Outcome
from tools.simulator.production import simulate
from tools.simulator.published_case import PublishedCase, QualityDraws
from tools.simulator.requests import Floats, Ints, Measured, SimulationInputError, joined
from tools.simulator.world import CORRECTNESS, PREFERENCE, world_of_levels, world_of_models

Variant = Literal["production", "published"]
VARIANTS: tuple[Variant, ...] = ("production", "published")

SCHEMES: Mapping[str, str] = {
    "base": "only the reference",
    "co2_opt": "the level with the least carbon, whatever its quality",
    "model_opt": "a larger and a smaller model, no directives",
    "sprout_sta": "the program with one prompt group, solved once",
    "sprout": "the program with one prompt group, every hour",
    "sprout_task": "the program with the clients' task labels as prompt groups",
    "sprout_context": "the program with prompt groups learned from the prompts",
    "oracle": "an upper bound: every request's energy and preferred level are known",
}
DEFAULT_SCHEMES = tuple(name for name in SCHEMES if name != "sprout_task")

BOOTSTRAP_PROMPTS_OF_MODELS = 1_000
"""Prompts judged before the first hour if two models are compared; of their verdicts only shares by task are known."""


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """Prompt groups, and the group of every prompt.

    Attributes:
        names: of the groups.
        learn: place in `names` of every prompt to learn from, as assigned by a model trained without it.
        measured: place in `names` of every prompt to measure on.
        families: families of groups about similar things, by group; None: all groups are of one family.
    """

    names: tuple[str, ...]
    learn: Ints
    measured: Ints
    families: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Prompts to measure on, and others to learn from.

    Attributes:
        learn: prompts to learn from.
        measured: prompts to measure on.
        contexts: prompt groups learned from `learn`; None if no scheme needs them.
    """

    learn: Measured
    measured: Measured
    contexts: Grouping | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experiment:
    """Inputs that all runs of one invocation share.

    Attributes:
        folds: all prompts to measure on, each in one fold; every fold is served by what was learned for it, and the
            folds are measured as one.
        mix: (hours, tasks), shares of the traffic.
        optimizer: settings, without the quality limits of a run.
        constant_bounds: metrics whose full loss is tolerated in every hour.
        large_preferred: (tasks,), share of prompts on which the larger model is preferred; None: not compared.
        draws: quality draws for the published variant.
        trigger: when the evaluator runs.
        settled_share: share of the prompts that are evaluated in groups whose decision is settled.
        requests_per_hour: of the traffic.
    """

    variant: Variant
    folds: tuple[Fold, ...]
    mix: Floats
    optimizer: OptimizerSettings
    constant_bounds: frozenset[str] = frozenset()
    large_preferred: Floats | None = None
    draws: QualityDraws | None = None
    trigger: OpportunityRules = field(default_factory=OpportunityRules)
    settled_share: float = 0.1
    requests_per_hour: float = DEFAULT_REQUESTS_PER_HOUR
    prompts_per_evaluation: int = 500
    judge: JudgeCost = field(default_factory=JudgeCost)
    seed: int = 1

    @property
    def measured(self) -> Measured:
        """All prompts to measure on."""
        return joined([fold.measured for fold in self.folds])


def run(experiment: Experiment, scheme: str, window: Window, xi: Mapping[str, float]) -> Outcome:
    """One scheme in one window.

    Raises:
        SimulationInputError: an input that the scheme needs is missing, or the mix has a task without prompts.
    """
    _require_prompts(experiment)
    if experiment.variant == "published":
        return _published(experiment, scheme, window, xi)
    return _production(experiment, scheme, window, xi)


def _require_prompts(experiment: Experiment) -> None:
    has_prompts = np.bincount(experiment.measured.task, minlength=len(experiment.measured.tasks)) > 0
    missing = [experiment.measured.tasks[task] for task in np.flatnonzero(experiment.mix.any(axis=0) & ~has_prompts)]
    if missing:
        raise SimulationInputError(
            f"the mix has task {', '.join(missing)}, for which there is no prompt to measure on: add prompts of it to "
            "--requests, try another --seed for the halves, or a mix without it"
        )


def _published(experiment: Experiment, scheme: str, window: Window, xi: Mapping[str, float]) -> Outcome:
    decide = published.SCHEMES.get(scheme)
    if decide is None:
        raise SimulationInputError(
            f"scheme {scheme!r} was not published; --variant published has {', '.join(published.SCHEMES)}"
        )
    if CORRECTNESS in xi:
        raise SimulationInputError(
            "--xi-correctness needs --variant production: the published code limits preference only"
        )
    if experiment.draws is None:
        raise ValueError("the published variant needs draws of quality")
    return decide(
        PublishedCase(
            window=window, measured=experiment.measured, mix=experiment.mix, draws=experiment.draws, xi=xi[PREFERENCE]
        )
    )


def _production(experiment: Experiment, scheme: str, window: Window, xi: Mapping[str, float]) -> Outcome:
    if scheme == "oracle":
        return _oracle(experiment, window, xi)
    case = _model_opt if scheme == "model_opt" else _of_levels
    return simulate([case(experiment, fold, scheme, window, xi) for fold in experiment.folds])


def _of_levels(
    experiment: Experiment, fold: Fold, scheme: str, window: Window, xi: Mapping[str, float]
) -> ProductionCase:
    grouping = _GROUPINGS[scheme](fold) if scheme in _GROUPINGS else _one_group(fold)
    return ProductionCase(
        scheme=scheme,
        rule=_RULES[scheme],
        window=window,
        mix=experiment.mix,
        world=world_of_levels(fold.measured, grouping.measured, grouping.names),
        judge=LevelJudge(
            fold.learn,
            grouping.learn,
            grouping.names,
            experiment.judge,
            # Prompts judged before the window came from similar traffic; the mix of hour 0 is not typical of a day.
            traffic=experiment.mix.mean(axis=0),
            half_life_s=experiment.optimizer.quality_half_life_s,
        ),
        families=grouping.families,
        operation=_operation(experiment, xi),
    )


def _model_opt(
    experiment: Experiment, fold: Fold, scheme: str, window: Window, xi: Mapping[str, float]
) -> ProductionCase:
    if experiment.large_preferred is None:
        raise SimulationInputError("scheme model_opt needs --model-preference: how often the larger model is preferred")
    return ProductionCase(
        scheme=scheme,
        rule="program",
        window=window,
        mix=experiment.mix,
        world=world_of_models(fold.measured, experiment.large_preferred),
        judge=ModelJudge(
            fold.learn, experiment.large_preferred, bootstrap_prompts=BOOTSTRAP_PROMPTS_OF_MODELS, cost=experiment.judge
        ),
        # Correctness of the second model was not measured.
        operation=_operation(experiment, {PREFERENCE: xi[PREFERENCE]}),
    )


def _oracle(experiment: Experiment, window: Window, xi: Mapping[str, float]) -> Outcome:
    """The upper bound, with the true quality of every hour and the intensity range of the whole year."""
    judged = experiment.measured.taken(experiment.measured.judged)
    # As in world.py: a task without a judged prompt adds nothing at any level.
    shares = np.zeros((len(judged.tasks), len(judged.levels)))
    for task in np.unique(judged.task):
        shares[task] = np.bincount(judged.preferred[judged.task == task], minlength=len(judged.levels))
        shares[task] /= shares[task].sum()
    quality = experiment.mix @ shares
    halves = np.full(len(experiment.mix), 0.5)
    draws = QualityDraws(quality, halves, quality[:, :2], quality)
    return published.oracle(
        PublishedCase(window=window, measured=experiment.measured, mix=experiment.mix, draws=draws, xi=xi[PREFERENCE])
    )


def _operation(experiment: Experiment, xi: Mapping[str, float]) -> Operation:
    return Operation(
        optimizer=experiment.optimizer.model_copy(
            update={
                "xi": dict(xi),
                "constant_bounds": experiment.constant_bounds & xi.keys(),
                "floors": {metric: floor for metric, floor in experiment.optimizer.floors.items() if metric in xi},
                "hourly_floors": {
                    metric: floor for metric, floor in experiment.optimizer.hourly_floors.items() if metric in xi
                },
            }
        ),
        trigger=experiment.trigger,
        settled_share=experiment.settled_share,
        requests_per_hour=experiment.requests_per_hour,
        prompts_per_evaluation=experiment.prompts_per_evaluation,
        seed=experiment.seed,
    )


def _one_group(fold: Fold) -> Grouping:
    return Grouping(("all",), np.zeros(len(fold.learn), np.int64), np.zeros(len(fold.measured), np.int64))


def _by_task(fold: Fold) -> Grouping:
    return Grouping(fold.measured.tasks, fold.learn.task, fold.measured.task)


def _learned(fold: Fold) -> Grouping:
    if fold.contexts is None:
        raise ValueError("no prompt groups were learned")
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


def without_texts(experiment: Experiment) -> Experiment:
    """A copy without the prompts' texts, which no run needs, so that it is sent to other processes quickly."""

    def stripped(measured: Measured) -> Measured:
        return replace(measured, prompts=("",) * len(measured))

    folds = tuple(
        replace(fold, learn=stripped(fold.learn), measured=stripped(fold.measured)) for fold in experiment.folds
    )
    return replace(experiment, folds=folds)


def names_of(text: str) -> Sequence[str]:
    """Scheme names in a comma-separated list.

    Raises:
        SimulationInputError: a name is unknown, or the list is empty.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or (unknown := [name for name in names if name not in SCHEMES]):
        raise SimulationInputError(
            f"there is no scheme {', '.join(unknown) if names else text!r}; there are {', '.join(SCHEMES)}"
        )
    return names

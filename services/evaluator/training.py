"""Learns prompt groups from judged prompts, and re-aggregates their verdicts by them. Pure functions.

Each judged prompt is assigned to the group that a model without its verdict predicts (leave-one-out), so that quality
counted by group is not biased by overfitting (docs/decisions/0008-prompt-groups.md).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import numpy as np

from services.evaluator.clusters import (
    PROMPTS_PER_GROUP,
    Doubles,
    Indices,
    TooFewPromptsError,
    learn_groups_from_features,
)
from services.evaluator.cost import EnergyByPool
from services.evaluator.preference import PREFERENCE
from services.evaluator.quality import JudgedPrompt, prompt_hashes, tally
from shared.carbon import JOULES_PER_KWH
from shared.grouping import CLASSIFIER, FEATURES, pack
from shared.messages import GroupEvidence, GroupTaken, PromptGrouping

LabelledPrompts = Sequence[tuple[str, JudgedPrompt]]
"""Judged prompts, each with the group in which it is counted."""


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Judged prompts that were answered at the same levels.

    Attributes:
        levels: of the fleet, the reference first.
    """

    prompts: Sequence[JudgedPrompt]
    levels: tuple[str, ...]

    @classmethod
    def select(cls, prompts: Sequence[JudgedPrompt], levels: Sequence[str], *, minimum: int) -> "TrainingSet":
        """Take the prompts that were answered at exactly these levels by the reference's weights.

        Raises:
            TooFewPromptsError: fewer than `minimum`.
        """
        wanted = tuple(levels)
        found = [one for one in prompts if tuple(answer.level for answer in one.answers[: len(wanted)]) == wanted]
        different = len({one.prompt for one in found})
        if different < minimum:
            raise TooFewPromptsError(
                f"{different} different prompts were judged at levels {', '.join(wanted)}, {minimum} are needed"
            )
        return cls(found, wanted)

    def newest_of_each_prompt(self, limit: int) -> "TrainingSet":
        """The newest verdict on each of the prompts that were judged last, at most `limit` of them, the newest last."""
        newest = {one.prompt: one for one in self.prompts}
        order = list(dict.fromkeys(one.prompt for one in reversed(self.prompts)))[:limit]
        return TrainingSet([newest[prompt] for prompt in reversed(order)], self.levels)

    def preferred(self) -> Indices:
        """(prompts,) index of the level that won, whichever weights won; the less brief one of equal answers."""
        index = {level: number for number, level in enumerate(self.levels)}
        winners = [max(one.answers, key=lambda answer: answer.outcomes.get(PREFERENCE, 0.0)) for one in self.prompts]
        return np.array([index[winner.level] for winner in winners], dtype=np.int64)

    def energy_kwh(self, energy: EnergyByPool) -> Doubles:
        """(prompts, levels) energy of the reference's weights; proportional to tokens where it is unknown."""
        return np.array(
            [
                [
                    max(1, answer.tokens) * (_joules_per_token(answer.generated_by, energy) or 1.0) / JOULES_PER_KWH
                    for answer in prompt.answers[: len(self.levels)]
                ]
                for prompt in self.prompts
            ]
        )

    def other_metrics(self) -> list[Doubles]:
        """(prompts, levels) outcomes of every metric except preference; NaN where a metric has no outcome."""
        answers = [prompt.answers[: len(self.levels)] for prompt in self.prompts]
        names = {name for row in answers for answer in row for name in answer.outcomes} - {PREFERENCE}
        return [
            np.array([[answer.outcomes.get(name, np.nan) for answer in row] for row in answers])
            for name in sorted(names)
        ]


@dataclass(frozen=True, slots=True)
class LearnedGrouping:
    """A new version of prompt groups.

    Attributes:
        message: to be published.
        group_of: group in which each judged prompt is counted from now on, by its id.
    """

    message: PromptGrouping
    group_of: Mapping[str, str]


def learn_grouping(
    model: str,
    judged: TrainingSet,
    *,
    learn_from: int,
    traffic: Mapping[str, float],
    energy: EnergyByPool,
    learned_at: datetime,
    prompts_per_group: int = PROMPTS_PER_GROUP,
) -> LearnedGrouping:
    """Learn groups from the newest verdicts, and re-aggregate all verdicts by them.

    Of each prompt one verdict is learned from: a prompt that was judged several times would be predicted from its own
    other verdicts. Every verdict counts in the group that a model which has not seen its prompt assigns: those learned
    from by leave-one-out, the earlier ones by the learned groups themselves.

    Args:
        judged: all judged prompts, the newest last.
        learn_from: most prompts to learn from.
        traffic: frequency of each stratum in any unit.
        energy: gives the energy per token.
        prompts_per_group: see `learn_groups_from_features`.

    Raises:
        TooFewPromptsError: the prompts form no two groups; then task labels are the better groups.
    """
    training = judged.newest_of_each_prompt(learn_from)
    learned = learn_groups_from_features(
        [one.features for one in training.prompts],
        training.preferred(),
        training.energy_kwh(energy),
        training.other_metrics(),
        [one.task for one in training.prompts],
        prompts_per_group=prompts_per_group,
    )
    if len(learned.groups.names) < 2:
        raise TooFewPromptsError(f"{len(training.prompts)} judged prompts do not form two groups")
    names = {
        one.prompt: learned.groups.names[index]
        for one, index in zip(training.prompts, learned.leave_one_out, strict=True)
    }
    labelled = [
        (names.get(one.prompt) or learned.groups.assign_features(one.features, one.task), one) for one in judged.prompts
    ]
    message = PromptGrouping(
        model=model,
        version=learned.groups.version,
        learned_at=learned_at,
        prompts=len({one.prompt for one in judged.prompts}),
        names=learned.groups.names,
        families=learned.families,
        features=FEATURES,
        classifier=CLASSIFIER,
        arrays=pack(learned.groups),
        task_scores={task: tuple(scores.tolist()) for task, scores in learned.groups.task_scores.items()},
        traffic=_traffic_shares(labelled, traffic),
        evidence=tuple(_evidence(labelled)),
        taken=tuple(_resource_use(labelled, energy)),
    )
    return LearnedGrouping(message, {prompt.id: name for name, prompt in labelled})


def _joules_per_token(option: str, energy: EnergyByPool) -> float | None:
    known = energy.get(("evaluation", option.rpartition("/")[0]))
    return None if known is None else known.joules_per_token


def _traffic_shares(labelled: LabelledPrompts, traffic: Mapping[str, float]) -> dict[str, float]:
    """Traffic share by group. Strata are sampled unevenly, so each prompt is weighted by its stratum's traffic."""
    judged: dict[str, float] = defaultdict(float)
    for _, prompt in labelled:
        judged[prompt.stratum] += prompt.weight
    if not any(traffic.get(stratum) for stratum in judged):
        traffic = judged
    total = sum(traffic.get(stratum, 0.0) for stratum in judged)
    shares: dict[str, float] = defaultdict(float)
    for group, prompt in labelled:
        shares[group] += prompt.weight * traffic.get(prompt.stratum, 0.0) / judged[prompt.stratum] / total
    return {group: min(1.0, share) for group, share in sorted(shares.items())}


def _evidence(labelled: LabelledPrompts) -> Iterator[GroupEvidence]:
    """Counts by day, so that readers can discount older days."""
    days: dict[date, list[tuple[str, JudgedPrompt]]] = defaultdict(list)
    for group, prompt in labelled:
        days[prompt.evaluated_at.date()].append((group, prompt))
    for _, found in sorted(days.items()):
        yield GroupEvidence(
            evaluated_at=max(prompt.evaluated_at for _, prompt in found),
            counts=tally(found),
            prompt_hashes=prompt_hashes(found),
        )


def _resource_use(labelled: LabelledPrompts, energy: EnergyByPool) -> Iterator[GroupTaken]:
    """Energy, time and tokens of the judged answers by group and option, where the energy is known."""
    sums: dict[tuple[str, str], Doubles] = defaultdict(lambda: np.zeros(5))
    for group, prompt in labelled:
        for answer in prompt.answers:
            joules = _joules_per_token(answer.generated_by, energy)
            if joules is not None:
                energy_kwh = answer.tokens * joules / JOULES_PER_KWH
                used = (1.0, energy_kwh, answer.seconds, answer.tokens, prompt.weight)
                sums[group, answer.generated_by] += prompt.weight * np.array(used)
    for (group, option), (weight, *_, squares) in sorted(sums.items()):
        # Weighted means of the effective number of answers, as in `tally`.
        requests, energy_kwh, seconds, tokens = (sums[group, option][:4] * weight / squares).tolist()
        yield GroupTaken(
            group=group,
            option=option,
            requests=requests,
            energy_kwh=energy_kwh,
            processing_s=max(0.0, seconds),
            completion_tokens=tokens,
        )

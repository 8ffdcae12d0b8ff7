"""When prompt groups are learned anew, and what is published of them. Decides; nothing is read or written.

What was judged is restated by the new groups: each prompt is counted in the group in which a model would have put it
that had not seen it, so that quality is not flattered by what was learned by heart (docs/decisions/0008).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import numpy as np

from services.evaluator.counting import PREFERENCE, tally
from services.evaluator.grouping import Doubles, Places, TooFewPromptsError, learn_from
from services.evaluator.judged import JudgedPrompt, stacked
from services.evaluator.spending import JOULES_PER_KWH, EnergyBook
from shared.grouping import CLASSIFIER, FEATURES, pack
from shared.messages import GroupEvidence, GroupTaken, PromptGrouping


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRules:
    """When to learn.

    Attributes:
        least: judged prompts before groups are learned at all.
        growth: share of the prompts learned from by which more must have been judged before they are learned anew.
        most: newest judged prompts that are learned from.
    """

    least: int
    growth: float
    most: int


@dataclass(frozen=True, slots=True)
class Lesson:
    """What was learned.

    Attributes:
        grouping: as it is published.
        groups: that the prompts are counted in from now on, by request id.
    """

    grouping: PromptGrouping
    groups: Mapping[str, str]


def learning_due(rules: LearningRules, *, judged: int, fresh: int, learned_from: int | None) -> bool:
    """Whether to learn.

    Args:
        judged: prompts that may be learned from.
        fresh: of these, judged since the version in force was learned.
        learned_from: prompts that it was learned from; null: there is none.
    """
    if judged < rules.least:
        return False
    return learned_from is None or fresh >= rules.growth * min(learned_from, rules.most)


def comparable(prompts: Sequence[JudgedPrompt], levels: Sequence[str], *, least: int) -> list[JudgedPrompt]:
    """The prompts that were answered at these very levels by the reference's weights.

    Raises:
        TooFewPromptsError: fewer than `least`.
    """
    wanted = tuple(levels)
    found = [one for one in prompts if tuple(answer.level for answer in one.answers[: len(wanted)]) == wanted]
    if len(found) < least:
        raise TooFewPromptsError(f"{len(found)} prompts were judged at levels {', '.join(wanted)}, {least} are needed")
    return found


def learn(
    model: str,
    prompts: Sequence[JudgedPrompt],
    *,
    levels: Sequence[str],
    traffic: Mapping[str, float],
    book: EnergyBook,
    learned_at: datetime,
) -> Lesson:
    """Learn groups, and restate by them all that was judged.

    Args:
        prompts: `comparable` ones.
        traffic: any measure of how often each stratum is asked for.
        book: energy per token comes from here; a pool without an entry counts by its tokens.

    Raises:
        TooFewPromptsError: no two groups can be told apart; task labels, where there are any, tell more than one group.
    """
    learned = learn_from(
        stacked(list(prompts)),
        _preferred(prompts, levels),
        _energy_kwh(prompts, len(levels), book),
        _judged_otherwise(prompts, len(levels)),
    )
    if len(learned.groups.names) < 2:
        raise TooFewPromptsError(f"{len(prompts)} judged prompts do not tell two groups apart")
    names = [learned.groups.names[place] for place in learned.unseen]
    counted = list(zip(names, prompts, strict=True))
    grouping = PromptGrouping(
        model=model,
        version=learned.groups.version,
        learned_at=learned_at,
        prompts=len(prompts),
        names=learned.groups.names,
        families=learned.families,
        features=FEATURES,
        classifier=CLASSIFIER,
        arrays=pack(learned.groups),
        traffic=_traffic(counted, traffic),
        evidence=tuple(_evidence(counted)),
        taken=tuple(_taken(counted, book)),
    )
    return Lesson(grouping, {prompt.request_id: name for name, prompt in counted})


def _preferred(prompts: Sequence[JudgedPrompt], levels: Sequence[str]) -> Places:
    """Place of the level that won each prompt, whichever weights won; of equal answers the least brief."""
    place = {level: number for number, level in enumerate(levels)}
    winners = [max(one.answers, key=lambda answer: answer.successes.get(PREFERENCE, 0.0)).level for one in prompts]
    return np.array([place[level] for level in winners], dtype=np.int64)


def _energy_kwh(prompts: Sequence[JudgedPrompt], levels: int, book: EnergyBook) -> Doubles:
    """(prompts, levels), of the reference's weights; only its ratios matter where energy is not known."""
    return np.array(
        [
            [max(1, one.tokens) * (_joules_per_token(one.asked, book) or 1.0) / JOULES_PER_KWH for one in found]
            for found in (prompt.answers[:levels] for prompt in prompts)
        ]
    )


def _judged_otherwise(prompts: Sequence[JudgedPrompt], levels: int) -> list[Doubles]:
    """(prompts, levels) of every metric but preference, of the reference's weights; NaN where it was not told."""
    answers = [prompt.answers[:levels] for prompt in prompts]
    metrics = {metric for found in answers for one in found for metric in one.successes} - {PREFERENCE}
    return [
        np.array([[one.successes.get(metric, np.nan) for one in found] for found in answers])
        for metric in sorted(metrics)
    ]


def _joules_per_token(option: str, book: EnergyBook) -> float | None:
    known = book.get(("evaluation", option.rpartition("/")[0]))
    return known.joules / known.tokens if known is not None and known.tokens else None


def _traffic(counted: Sequence[tuple[str, JudgedPrompt]], traffic: Mapping[str, float]) -> dict[str, float]:
    """Share of the traffic by group: prompts were taken from the strata unevenly, and are weighted back."""
    judged: dict[str, int] = defaultdict(int)
    for _, prompt in counted:
        judged[prompt.stratum] += 1
    if not any(traffic.get(stratum) for stratum in judged):
        traffic = judged
    whole = sum(traffic.get(stratum, 0.0) for stratum in judged)
    shares: dict[str, float] = defaultdict(float)
    for group, prompt in counted:
        shares[group] += traffic.get(prompt.stratum, 0.0) / judged[prompt.stratum] / whole
    return {group: min(1.0, share) for group, share in sorted(shares.items())}


def _evidence(counted: Sequence[tuple[str, JudgedPrompt]]) -> Iterator[GroupEvidence]:
    days: dict[date, list[tuple[str, JudgedPrompt]]] = defaultdict(list)
    for group, prompt in counted:
        days[prompt.evaluated_at.date()].append((group, prompt))
    for _, found in sorted(days.items()):
        yield GroupEvidence(evaluated_at=max(prompt.evaluated_at for _, prompt in found), counts=tally(found))


def _taken(counted: Sequence[tuple[str, JudgedPrompt]], book: EnergyBook) -> Iterator[GroupTaken]:
    """What the answers took, where their energy is known."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for group, prompt in counted:
        for answer in prompt.answers:
            joules = _joules_per_token(answer.asked, book)
            if joules is not None:
                sums[group, answer.asked][0] += 1.0
                sums[group, answer.asked][1] += answer.tokens * joules / JOULES_PER_KWH
                sums[group, answer.asked][2] += answer.seconds
    for (group, option), (requests, energy_kwh, seconds) in sorted(sums.items()):
        yield GroupTaken(
            group=group, option=option, requests=requests, energy_kwh=energy_kwh, processing_s=max(0.0, seconds)
        )

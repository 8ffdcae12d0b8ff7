"""Quality metrics: what a metric is, the stored outcomes of judged prompts, and the counts that are published.

A quality metric scores the answers to one prompt, one outcome in [0, 1] per candidate. To add one, implement
`QualityMetric`, construct it in `Evaluator` (app.py), and name it in the optimizer's settings. Storage, counting, group
learning and messages treat all metrics alike.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, Self

from services.evaluator.cost import CallContext
from shared.grouping import DEFAULT_GROUP, PromptFeatures
from shared.messages import ChatMessage, Paired, QualityCount, Sample


class QualityMetric(Protocol):
    """Scores the answers to one prompt."""

    @property
    def name(self) -> str:
        """Name of the metric in messages and settings."""

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> Sequence[float] | None:
        """Score the answers of all candidates.

        Returns:
            Outcomes in [0, 1], one per answer; None: the metric is undecided or undefined for this prompt.

        Raises:
            JudgeError: the metric could not be computed.
        """


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer to a judged prompt.

    Attributes:
        options: options for which the outcomes count.
        generated_by: the one of them that generated the answer.
        seconds: event time from sending the call to the last token.
        outcomes: in [0, 1], by metric.
    """

    level: str
    options: tuple[str, ...]
    generated_by: str
    tokens: int
    seconds: float
    outcomes: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The document that is stored; its keys are part of the database schema."""
        return {
            "level": self.level,
            "options": list(self.options),
            "asked": self.generated_by,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "successes": dict(self.outcomes),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Parse the result of `to_json`."""
        return cls(
            level=document["level"],
            options=tuple(document["options"]),
            generated_by=document["asked"],
            tokens=document["tokens"],
            seconds=document["seconds"],
            outcomes=document["successes"],
        )


@dataclass(frozen=True, slots=True, eq=False)
class JudgedPrompt:
    """A prompt with the outcomes of its answers. It contains the prompt's features, never its text.

    Attributes:
        id: identifies the request, see `Sample.identity`.
        request_id: of the sample.
        stratum: task label under which the prompt was sampled; `DEFAULT_GROUP` if it had none.
        group: group in which it is counted.
        evaluated_at: event time.
        answers: of every candidate, the reference first.
        tenant: None: none, or stored by an earlier release.
        prompt_hash: the same for every request with this conversation; empty: stored by an earlier release.
        weight: number of sampled prompts that it stands for; more than 1 in a group that is judged thinly.
    """

    id: str
    request_id: str
    stratum: str
    group: str
    evaluated_at: datetime
    features: PromptFeatures
    answers: tuple[JudgedAnswer, ...]
    tenant: str | None = None
    weight: float = 1.0
    prompt_hash: str = ""

    @property
    def prompt(self) -> str:
        """Identifies the conversation, or the request where the conversation's hash is not known."""
        return self.prompt_hash or self.id

    @property
    def task(self) -> str | None:
        """The producer's task label."""
        return None if self.stratum == DEFAULT_GROUP else self.stratum

    def without(self, metrics: Collection[str]) -> Self:
        """The same prompt without the outcomes of these metrics."""
        return replace(
            self,
            answers=tuple(
                replace(one, outcomes={name: value for name, value in one.outcomes.items() if name not in metrics})
                for one in self.answers
            ),
        )


def hash_of(messages: Sequence[ChatMessage], key: bytes) -> str:
    """Keyed hash of a conversation: it recognises a prompt that is sent again, and reveals its text to nobody else.

    Args:
        key: secret of the deployment, at most `MAX_KEY_BYTES`; empty: none, so whoever knows the text can compute it.
    """
    text = json.dumps([(one.role, one.content) for one in messages])
    return blake2b(text.encode(), digest_size=6, key=key).hexdigest()


def prompt_hashes(judged: Iterable[tuple[str, JudgedPrompt]]) -> dict[str, tuple[str, ...]]:
    """Hashes of the judged conversations by group, one for each verdict; prompts without one are left out."""
    found: dict[str, list[str]] = defaultdict(list)
    for group, prompt in judged:
        if prompt.prompt_hash:
            found[group].append(prompt.prompt_hash)
    return {group: tuple(hashes) for group, hashes in sorted(found.items())}


class _Outcome(NamedTuple):
    weight: float
    value: float
    reference_option: str
    reference_value: float | None


def tally(judged: Iterable[tuple[str, JudgedPrompt]]) -> tuple[QualityCount, ...]:
    """Count outcomes by group, option and metric. A prompt is a trial of every option for which it was answered.

    Where prompts stand for different numbers of prompts, means are weighted, and the number of trials is the effective
    one (Kish): as many prompts of one weight would know the mean as well.

    Args:
        judged: prompts, each with the group in which to count it.
    """
    outcomes: dict[tuple[str, str, str], list[_Outcome]] = defaultdict(list)
    for group, prompt in judged:
        reference = prompt.answers[0]
        for answer in prompt.answers:
            for metric, value in answer.outcomes.items():
                outcome = _Outcome(prompt.weight, value, reference.options[0], reference.outcomes.get(metric))
                for option in answer.options:
                    outcomes[metric, group, option].append(outcome)
    return tuple(
        QualityCount(
            group=group,
            option=option,
            metric=metric,
            successes=_sum((one.weight, one.value) for one in found),
            trials=effective_number([one.weight for one in found]),
            paired=_paired(found),
        )
        for (metric, group, option), found in sorted(outcomes.items())
    )


def _paired(outcomes: Sequence[_Outcome]) -> Paired | None:
    """Joint counts with the reference; None if it has no outcome on some prompt, or if the reference changed."""
    known = [(one.weight, one.value, one.reference_value) for one in outcomes if one.reference_value is not None]
    references = {one.reference_option for one in outcomes}
    if len(known) < len(outcomes) or len(references) > 1:
        return None
    return Paired(
        reference=references.pop(),
        successes=_sum((weight, reference) for weight, _, reference in known),
        both=_sum((weight, min(value, reference)) for weight, value, reference in known),
    )


def effective_number(weights: Collection[float]) -> float:
    """Number of prompts of one weight that know a mean as well as these; their own number if all weights are equal."""
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def _sum(weighted: Iterable[tuple[float, float]]) -> float:
    """Weighted mean of values, given as (weight, value), times their effective number."""
    found = list(weighted)
    scale = sum(weight for weight, _ in found) / sum(weight**2 for weight, _ in found)
    return scale * sum(weight * value for weight, value in found)

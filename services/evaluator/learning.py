"""Prompt groups of every model: the current version, and when to learn a new one.

A new version re-aggregates all stored verdicts (`services/evaluator/training.py`).
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from services.evaluator.cost import EnergyByPool
from services.evaluator.group_store import GroupStore
from services.evaluator.quality import JudgedPrompt
from services.evaluator.settings import EvaluatorSettings
from shared.fleet import reworded
from shared.grouping import GroupingError, PromptGroups, prompt_text, unpack
from shared.messages import PromptGrouping, Sample
from shared.runtime.logs import get_logger

if TYPE_CHECKING:
    from services.evaluator.training import LearnedGrouping

_log = get_logger(__name__)


def learning_due(settings: EvaluatorSettings, *, judged: int, unused: int, learned_from: int | None) -> bool:
    """Whether to learn groups now.

    Args:
        judged: stored judged prompts.
        unused: of these, judged since the current version was learned.
        learned_from: prompts that the current version was learned from; None: there is no version.
    """
    if judged < settings.min_judged_to_learn:
        return False
    return learned_from is None or unused >= settings.relearn_growth * min(learned_from, settings.max_judged_to_learn)


class GroupLearner:
    """Prompt groups of every model; methods raise `DatabaseUnavailableError`."""

    def __init__(self, store: GroupStore, settings: EvaluatorSettings, *, directives: Mapping[str, str]) -> None:
        """Create.

        Args:
            directives: hashes of the fleet's texts, by level, the reference first.
        """
        self._store = store
        self._settings = settings
        self._directives = dict(directives)
        self._cached: dict[str, tuple[str | None, PromptGroups | None]] = {}

    @property
    def enabled(self) -> bool:
        """Whether groups are learned; otherwise they are the producers' task labels."""
        return self._settings.prompt_groups == "learned"

    async def check_directives(self, models: Collection[str]) -> None:
        """Warn if texts have changed since the last verdicts: those on the old texts do not count."""
        await self._store.note_directives()
        for model in models:
            last, others = await self._store.last_directives(model)
            if levels := reworded(last, self._directives):
                _log.warning(
                    "the text of directives has changed: verdicts that compared the old texts do not count",
                    model=model,
                    levels=levels,
                    verdicts=others,
                    remedy="put the old text back and give the new one a level of its own: then what is known counts",
                )

    async def withdraw_if_disabled(self, models: Collection[str], now: datetime) -> None:
        """If groups are not learned, store a message per model that makes readers return to task labels."""
        if self.enabled:
            return
        for model in models:
            if await self._store.version(model) is not None:
                await self._store.save(PromptGrouping(model=model, version=None, learned_at=now), {})
                _log.info("learned prompt groups withdrawn", model=model)

    async def assignment(self, model: str, samples: Sequence[Sample]) -> Callable[[Sample], str]:
        """A function that gives the group in which a sample is counted: a learned group, or its task label."""
        groups = await self._current(model)
        if groups is None:
            return lambda sample: sample.group
        # Prompts of the training set keep their leave-one-out group.
        earlier = await self._store.groups_of(model, [sample.identity for sample in samples])
        names = set(groups.names)

        def group_of(sample: Sample) -> str:
            known = earlier.get(sample.identity)
            return known if known in names else groups.assign(prompt_text(sample.messages), sample.task)

        return group_of

    async def learn_if_due(
        self, model: str, *, traffic: Mapping[str, float], energy: EnergyByPool, now: datetime
    ) -> PromptGrouping | None:
        """Learn and store a new version if it is due; the caller must hold the claim on the model.

        Returns:
            The new version, which is to be published; None if there is none.
        """
        if not self.enabled:
            return None
        progress = await self._store.progress(model)
        # A version of another release, or with verdicts on other texts, is replaced without waiting for new verdicts.
        usable = await self._current(model) is not None and not await self._is_reworded(model)
        learned_from = progress.learned_from if usable else None
        if not learning_due(self._settings, judged=progress.judged, unused=progress.unused, learned_from=learned_from):
            return None
        prompts = await self._store.judged_prompts(model, limit=self._settings.max_judged)
        learned = await asyncio.to_thread(self._learn, model, prompts, traffic, energy, now)
        if learned is None:
            return None
        message = learned.message.model_copy(update={"directives": self._directives})
        await self._store.save(message, learned.group_of)
        _log.info(
            "prompt groups learned",
            model=model,
            version=message.version,
            groups=len(message.names),
            prompts=message.prompts,
        )
        return message

    def _learn(
        self,
        model: str,
        prompts: Sequence[JudgedPrompt],
        traffic: Mapping[str, float],
        energy: EnergyByPool,
        now: datetime,
    ) -> "LearnedGrouping | None":
        """Learn a version; None if there are too few prompts. Takes seconds of CPU time."""
        # It loads scikit-learn and SciPy, which takes longer than all other imports of the evaluator together.
        from services.evaluator.clusters import TooFewPromptsError  # noqa: PLC0415
        from services.evaluator.training import TrainingSet, learn_grouping  # noqa: PLC0415

        settings = self._settings
        try:
            judged = TrainingSet.select(prompts, tuple(self._directives), minimum=settings.min_judged_to_learn)
            return learn_grouping(
                model,
                judged,
                learn_from=settings.max_judged_to_learn,
                traffic=traffic,
                energy=energy,
                learned_at=now,
                prompts_per_group=settings.prompts_per_group,
            )
        except TooFewPromptsError as error:
            _log.info("prompt groups not learned yet", model=model, reason=str(error))
            return None

    async def _is_reworded(self, model: str) -> bool:
        """Whether the newest version carries verdicts on other texts of the directives."""
        message = await self._store.grouping(model)
        return message is not None and bool(reworded(message.directives, self._directives))

    async def _current(self, model: str) -> PromptGroups | None:
        """The newest version, whichever process learned it; None if there is none that this release can use."""
        if not self.enabled:
            return None
        version = await self._store.version(model)
        if model not in self._cached or self._cached[model][0] != version:
            message = await self._store.grouping(model) if version is not None else None
            try:
                groups = None if message is None else unpack(message)
            except GroupingError as error:
                _log.warning("learned prompt groups cannot be used", model=model, reason=str(error))
                groups = None
            self._cached[model] = version, groups
        return self._cached[model][1]

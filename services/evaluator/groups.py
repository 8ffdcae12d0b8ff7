"""The prompt groups in force: which one a sample is counted in, and the learning of new ones after an evaluation."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from services.evaluator.group_storage import GroupStorage
from services.evaluator.grouping import TooFewPromptsError
from services.evaluator.learning import LearningRules, comparable, learn, learning_due
from services.evaluator.spending import EnergyBook
from shared.grouping import GroupingError, PromptGroups, prompt_text, unpack
from shared.messages import PromptGrouping, Sample
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class Groups:
    """Prompt groups of every model. What raises `RetryLaterError` does so while the database is away."""

    def __init__(self, storage: GroupStorage, *, rules: LearningRules | None, levels: Sequence[str]) -> None:
        """Set up.

        Args:
            rules: when to learn; null: groups are the producers' task labels.
            levels: of the fleet, in order.
        """
        self._storage = storage
        self._rules = rules
        self._levels = tuple(levels)
        self._known: dict[str, PromptGroups | None] = {}
        self._versions: dict[str, str | None] = {}

    async def give_up(self, models: Collection[str], now: datetime) -> None:
        """Where groups are not learned, take back those that were: readers return to task labels."""
        if self._rules is not None:
            return
        for model in models:
            if await self._storage.version(model) is not None:
                given_up = PromptGrouping(model=model, version=None, learned_at=now)
                await self._storage.keep(given_up, {})
                _log.info("learned prompt groups are given up", model=model)

    async def assignment(self, model: str, samples: Sequence[Sample]) -> Callable[[Sample], str]:
        """Which group each of these samples is counted in: a learned one where there are any, else its own."""
        groups = await self._in_force(model)
        if groups is None:
            return lambda sample: sample.group
        # What the groups were learned from stays where a model puts it that had not seen it.
        before = await self._storage.groups_of(model, [sample.request_id for sample in samples])
        names = set(groups.names)

        def group_of(sample: Sample) -> str:
            known = before.get(sample.request_id)
            return known if known in names else groups.assign(prompt_text(sample.messages))

        return group_of

    async def learn(
        self, model: str, *, traffic: dict[str, float], book: EnergyBook, now: datetime
    ) -> PromptGrouping | None:
        """Learn a model's groups if it is time; only to be called with the claim on the model.

        Returns:
            The new version, kept and to be published; null where there is none.
        """
        rules = self._rules
        if rules is None:
            return None
        progress = await self._storage.progress(model)
        # A version that this release cannot use, another one's, is as good as none.
        learned_from = progress.learned_from if await self._in_force(model) is not None else None
        if not learning_due(rules, judged=progress.judged, fresh=progress.fresh, learned_from=learned_from):
            return None
        kept = await self._storage.judged(model, most=rules.most)
        try:
            prompts = comparable(kept, self._levels, least=rules.least)
            lesson = await asyncio.to_thread(
                learn, model, prompts, levels=self._levels, traffic=traffic, book=book, learned_at=now
            )
        except TooFewPromptsError as error:
            _log.info("prompt groups are not learned yet", model=model, reason=str(error))
            return None
        await self._storage.keep(lesson.grouping, lesson.groups)
        _log.info(
            "prompt groups learned",
            model=model,
            version=lesson.grouping.version,
            groups=len(lesson.grouping.names),
            prompts=lesson.grouping.prompts,
        )
        return lesson.grouping

    async def _in_force(self, model: str) -> PromptGroups | None:
        """The newest version, whichever process learned it."""
        if self._rules is None:
            return None
        version = await self._storage.version(model)
        if model not in self._known or self._versions[model] != version:
            message = await self._storage.grouping(model) if version is not None else None
            try:
                groups = None if message is None else unpack(message)
            except GroupingError as error:
                _log.warning("learned prompt groups cannot be used", model=model, reason=str(error))
                groups = None
            self._known[model], self._versions[model] = groups, version
        return self._known[model]

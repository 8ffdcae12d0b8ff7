"""Runs a trial: every directive answers the same prompts, and a judge compares each answer with that without one.

It uses the evaluator's calls and metrics. The directives answer one after the other, so that the meter of the servers
shows the energy of each.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar
from uuid import uuid4

import numpy as np
from prometheus_client import CollectorRegistry

from services.evaluator.card import comparison_fault
from services.evaluator.correctness import CorrectnessMetric
from services.evaluator.cost import CallContext
from services.evaluator.generate import Answer, CallError, ModelCalls
from services.evaluator.judge_clients import judge_pool, open_judge
from services.evaluator.judges import Judge, JudgeError
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.preference import PreferenceMetric
from services.evaluator.quality import QualityMetric
from services.evaluator.settings import EvaluatorSettings
from shared.fleet import Directive, Fleet
from shared.inference.attempts import Attempts
from shared.inference.base import StreamTimeouts
from shared.inference.pools import Pools
from shared.messages import ChatMessage, Sample, SamplingParameters, UsageRecord
from shared.pools import Pool
from shared.runtime.clock import Clock
from tools.directives.comparison import Floats, Measurement
from tools.directives.inputs import TrialPrompt
from tools.directives.meter import PoolMeter

GROUP = "directives"
"""Prompt group of a trial's calls."""

T = TypeVar("T")

PublishUsage = Callable[[UsageRecord], Awaitable[None]]


class TrialError(RuntimeError):
    """A trial has no result; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What was measured.

    Attributes:
        measurements: of every directive, that of no directive first.
        prompts: number of prompts with an answer of every directive.
        unmetered: why there are no joules; None: the servers' meters were read.
        judge_fault: why the judge cannot be relied on; None: no reason.
    """

    measurements: tuple[Measurement, ...]
    prompts: int
    unmetered: str | None
    judge_fault: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSetup:
    """What is tried, and where.

    Attributes:
        candidates: are tried beside the fleet's directives.
        prompts: at least one.
        fleet: the model's reference pool answers.
        model: of the fleet.
    """

    candidates: Sequence[Directive]
    prompts: Sequence[TrialPrompt]
    fleet: Fleet
    model: str
    settings: EvaluatorSettings
    clock: Clock

    @property
    def pool(self) -> Pool:
        """The pool that answers."""
        return self.fleet.pools_of(self.model)[0]

    @property
    def directives(self) -> tuple[Directive, ...]:
        """All that are tried, no directive first."""
        return (*self.fleet.directives, *self.candidates)

    def samples(self) -> list[Sample]:
        """The prompts as the evaluator's metrics take them."""
        return [
            Sample(
                request_id=f"prompt-{number}",
                model=self.model,
                group=GROUP,
                messages=(ChatMessage(role="user", content=one.prompt),),
                sampling=SamplingParameters(max_tokens=self.settings.max_tokens),
                reference=one.reference,
                sampled_at=self.clock.now(),
            )
            for number, one in enumerate(self.prompts)
        ]


async def run_trial(setup: TrialSetup, *, publish_usage: PublishUsage, say: Callable[[str], None]) -> Trial:
    """Let all directives answer the prompts, and judge the answers.

    Args:
        publish_usage: publishes the record of a finished call.
        say: prints a line of progress.

    Raises:
        TrialError: too many calls fail, or no server responds.
        ChatTemplateError, FleetError: the fleet has no judge, or chat templates, tokenizers or files for TLS that
            cannot be used.
    """
    settings = setup.settings
    async with AsyncExitStack() as stack:
        calls = ModelCalls(
            fleet=setup.fleet.model_copy(update={"directives": setup.directives}),
            pools=await stack.enter_async_context(_open_pools(setup)),
            attempts=Attempts(
                clock=setup.clock,
                retry=settings,
                on_retry=lambda _: None,
                stream_timeouts=StreamTimeouts(settings.first_chunk_timeout_s, settings.first_chunk_timeout_s),
                stream_always=settings.stream,
            ),
            clock=setup.clock,
            publish_usage=publish_usage,
            concurrency=settings.concurrency,
            timeout_s=settings.call_timeout_s,
        )
        judge = await stack.enter_async_context(open_judge(setup.fleet, settings, calls))
        return await _RunningTrial(setup, calls, judge, say).run()


@asynccontextmanager
async def _open_pools(setup: TrialSetup) -> AsyncIterator[Pools]:
    """The pools, checked once and from then on.

    Raises:
        TrialError: the model's reference pool or the judge's does not respond.
        FleetError, ChatTemplateError: see `run_trial`.
    """
    settings, judge = setup.settings, judge_pool(setup.fleet, setup.settings)
    pools = Pools(
        setup.fleet,
        clock=setup.clock,
        circuit_breaker=settings,
        on_failure=lambda _: None,
        check_interval_s=settings.endpoint_check_interval_s,
        check_timeout_s=settings.endpoint_check_timeout_s,
        with_judge=judge is not None,
    )
    watching: asyncio.Task[None] | None = None
    try:
        for name in {setup.pool.name, judge or setup.pool.name}:
            pool = pools[name]
            await pool.check(timeout_s=settings.endpoint_check_timeout_s, every=True)
            if not pool.reachable:
                raise TrialError(f"no model server responds: {pool.unreachable()}")
        watching = asyncio.create_task(pools.watch())
        yield pools
    finally:
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        await pools.close()


class _RunningTrial:
    """One trial."""

    def __init__(self, setup: TrialSetup, calls: ModelCalls, judge: Judge, say: Callable[[str], None]) -> None:
        settings = setup.settings
        self._setup = setup
        self._settings = settings
        self._calls = calls
        self._context = CallContext(f"trial-{uuid4().hex}", setup.model, GROUP)
        self._preference = PreferenceMetric(judge, EvaluatorMetrics(CollectorRegistry()), rubric=settings.rubric)
        self._correctness = CorrectnessMetric(judge, asks_judge=lambda _: settings.correctness != "exact")
        self._say = say
        self._failures = 0

    async def run(self) -> Trial:
        """Answer, then judge."""
        samples, clock = self._setup.samples(), self._setup.clock
        meter = PoolMeter(self._setup.pool, timeout_s=self._settings.endpoint_check_timeout_s)
        answers: list[list[Answer | None]] = []
        joules: list[float | None] = []
        for directive in self._setup.directives:
            before = await meter.read(clock.now())
            found = await _all([self._answer(directive.level, one) for one in samples])
            answers.append(found)
            spent_j = meter.joules(before, await meter.read(clock.now()))
            tokens = [one.call.tokens for one in found if one is not None]
            joules.append(None if spent_j is None else spent_j / max(1, len(tokens)))
            self._say(f"{directive.level}: {len(tokens)} answers, {sum(tokens) / max(1, len(tokens)):.0f} tokens each")
        complete = [number for number in range(len(samples)) if all(found[number] is not None for found in answers)]
        if not complete:
            raise TrialError("no prompt was answered with every directive")
        kept = [samples[number] for number in complete]
        by_directive = [[one for number in complete if (one := found[number]) is not None] for found in answers]
        measurements = await self._measurements(kept, by_directive, joules)
        return Trial(
            measurements=tuple(measurements),
            prompts=len(complete),
            unmetered=meter.problem,
            judge_fault=comparison_fault(self._context.work.card, self._settings),
        )

    async def _measurements(
        self, samples: Sequence[Sample], answers: Sequence[Sequence[Answer]], joules: Sequence[float | None]
    ) -> list[Measurement]:
        right = await self._right(samples, answers)
        measurements: list[Measurement] = []
        for place, (directive, found) in enumerate(zip(self._setup.directives, answers, strict=True)):
            not_worse = np.ones(len(samples))
            if place:
                pairs = [(reference.text, one.text) for reference, one in zip(answers[0], found, strict=True)]
                scores = await self._score(self._preference, samples, pairs)
                not_worse = np.array([math.nan if one is None else float(one[1] >= one[0]) for one in scores])
                self._say(f"{directive.level}: judged, {np.isfinite(not_worse).sum()} verdicts")
            measurements.append(
                Measurement(
                    directive=directive,
                    tokens=np.array([one.call.tokens for one in found], dtype=np.float64),
                    seconds=np.array([one.call.seconds for one in found]),
                    not_worse=not_worse,
                    right=right[place],
                    joules=joules[place],
                )
            )
        return measurements

    async def _right(self, samples: Sequence[Sample], answers: Sequence[Sequence[Answer]]) -> Floats:
        """[directives, prompts]: whether answers are right, of prompts with a reference."""
        right = np.full((len(answers), len(samples)), math.nan)
        known = [number for number, one in enumerate(samples) if one.reference is not None]
        if self._settings.correctness == "off" or not known:
            return right
        texts = [tuple(found[number].text for found in answers) for number in known]
        scores = await self._score(self._correctness, [samples[number] for number in known], texts)
        for number, outcomes in zip(known, scores, strict=True):
            if outcomes is not None:
                right[:, number] = outcomes
        return right

    async def _answer(self, level: str, sample: Sample) -> Answer | None:
        """An answer; None if the call failed."""
        try:
            answer = await self._calls.generate(
                self._context,
                purpose="evaluation",
                pool=self._setup.pool.name,
                level=level,
                messages=sample.messages,
                sampling=sample.sampling,
            )
        except CallError as error:
            self._failed(error)
            return None
        self._failures = 0
        return answer

    async def _score(
        self, metric: QualityMetric, samples: Sequence[Sample], answers: Sequence[Sequence[str]]
    ) -> list[Sequence[float] | None]:
        """Outcomes of the answers to each prompt; None without a verdict."""

        async def score(sample: Sample, texts: Sequence[str]) -> Sequence[float] | None:
            try:
                outcomes = await metric.score(sample, texts, self._context)
            except JudgeError as error:
                self._failed(error)
                return None
            self._failures = 0
            return outcomes

        return await _all([score(one, texts) for one, texts in zip(samples, answers, strict=True)])

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= self._settings.max_consecutive_failures:
            raise TrialError(f"{self._failures} calls in a row failed, the last one: {error}") from error


async def _all(parts: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all; the first error cancels the others.

    Raises:
        TrialError: one of them raised it.
    """
    tasks = [asyncio.ensure_future(one) for one in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

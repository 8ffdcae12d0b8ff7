"""The learned curve: power and speed of an endpoint by batch size, fitted to its meter and its calls.

Two linear regressions, with sums that forget exponentially (`LeastSquares`):

- energy of an interval = idle_w x length + step_j x steps + token_j x tokens + prompt_token_j x prompt tokens;
- time per token of a call = step_s + token_s x its mean batch, weighted by tokens.

Intervals are learned from once the speed is known, because steps follow from it (`services.ledger.attribution`). While
calls run without a pause, length = step_s x steps + token_s x tokens: idle power can be separated from the steps'
energy only where the server also idled. At a constant batch steps and tokens cannot be separated. `Estimate.reason`
says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from services.ledger.attribution import Floats, Speed, Work
from shared.batch_curve import BatchCurve

MIN_INTERVALS = 30
"""Intervals with work, before a curve is called identifiable."""
MIN_CALLS = 30
"""Calls with a known time per token, before the speed is used."""
MIN_BATCH_VARIATION = 0.1
"""Standard deviation of the batch, relative to its mean, below which it counts as constant."""
MIN_IDLE_SHARE = 0.01
"""Share of the time without calls, below which idle power cannot be separated from the steps' energy."""
LARGEST_ERROR = 0.1
"""Largest standard error of a coefficient, relative to what a step takes."""
USUAL_BATCH = 256
"""A coefficient per token matters as much as one per step, divided by this many sequences."""
MODEL_ERROR = 0.01
"""Relative error of the model itself, which every standard error includes: steps are not observed."""

_SINGULAR = 1e-9
"""Eigenvalue of the scaled normal equations below which a direction counts as not observed."""
_SIGNIFICANT = 2.0
"""Number of standard errors from 0 up to which the cost of prompts is taken for 0."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A regression's result: coefficients >= 0, and their standard errors; infinite where nothing was observed."""

    values: tuple[float, ...]
    errors: tuple[float, ...]


class State(BaseModel):
    """A part of what is kept in PostgreSQL, as JSON."""

    model_config = ConfigDict(frozen=True)


class LeastSquares(State):
    """Sums of a weighted linear regression without intercept: all that is kept of its observations.

    Attributes:
        sums: products of the regressors and, last, the observed value, summed; (p + 1) x (p + 1).
        rows: number of observations by which the residuals are divided; forgotten ones count less.
    """

    sums: tuple[tuple[float, ...], ...]
    rows: float = 0.0

    @classmethod
    def empty(cls, regressors: int) -> "LeastSquares":
        """No observation yet."""
        return cls.of(np.zeros((regressors + 1, regressors + 1)), 0.0)

    @classmethod
    def of(cls, sums: Floats, rows: float) -> "LeastSquares":
        """From an array."""
        return cls(sums=tuple(tuple(row) for row in sums.tolist()), rows=rows)

    @property
    def array(self) -> Floats:
        """The sums as an array."""
        return np.array(self.sums, dtype=np.float64)

    def forgotten(self, share: float) -> "LeastSquares":
        """The sums with all weights multiplied by a number between 0 and 1."""
        return LeastSquares.of(self.array * share, self.rows * share)

    def with_rows(
        self, rows: Sequence[tuple[float, ...]], weights: Sequence[float], *, counted: int | None = None
    ) -> "LeastSquares":
        """The sums with more observations: regressors, then the observed value.

        Args:
            counted: how many of them count in `rows`; None: all.
        """
        if not rows:
            return self
        found = np.array(rows, dtype=np.float64)
        weighted = found * np.array(weights, dtype=np.float64)[:, None]
        return LeastSquares.of(self.array + found.T @ weighted, self.rows + (len(rows) if counted is None else counted))

    def fixing(self, column: int, value: float) -> "LeastSquares":
        """The regression in which a coefficient is known, without its column."""
        change = np.eye(len(self.sums))
        change[column, -1] = -value
        kept = [index for index in range(len(self.sums)) if index != column]
        return LeastSquares.of((change.T @ self.array @ change)[np.ix_(kept, kept)], self.rows)

    def solve(self) -> Coefficients:
        """Coefficients >= 0, of least norm in directions that were not observed.

        A coefficient that would be negative is 0; the standard errors are those without this bound.
        """
        size = len(self.sums) - 1
        solution, errors = self._solve(list(range(size)))
        free = list(range(size))
        values = solution
        while free and min(values) < 0:
            free.remove(free[int(np.argmin(values))])
            values, _ = self._solve(free)
        bounded = np.zeros(size)
        bounded[free] = values
        return Coefficients(tuple(bounded.tolist()), tuple(errors.tolist()))

    def _solve(self, columns: list[int]) -> tuple[Floats, Floats]:
        """Coefficients and standard errors of some columns, the others being 0."""
        sums = self.array
        normal, right = sums[np.ix_(columns, columns)], sums[columns, -1]
        scale = np.sqrt(np.diag(normal))
        scale[scale == 0] = 1.0
        eigenvalues, vectors = np.linalg.eigh(normal / np.outer(scale, scale))
        observed = eigenvalues > _SINGULAR
        inverse = (vectors[:, observed] / eigenvalues[observed]) @ vectors[:, observed].T
        values = inverse @ (right / scale) / scale
        residual = max(float(sums[-1, -1] - values @ right), 0.0) / max(self.rows - len(columns), 1.0)
        errors = np.sqrt(residual * np.maximum(np.diag(inverse), 0.0)) / scale
        hidden = (vectors[:, ~observed] ** 2).sum(axis=1) > _SINGULAR
        errors[hidden] = np.inf
        return values, errors


@dataclass(frozen=True, slots=True)
class IntervalSample:
    """An interval to learn from; everything that ran in it is known."""

    length_s: float
    idle_s: float
    metered_j: float
    work: Work


class CallSample(NamedTuple):
    """A finished call to learn from.

    Attributes:
        token_time_s: seconds per generated token after the first; None if unknown.
        mean_batch: sequences in its steps, on average; 0 if unknown.
        waited_s: from its start to the step of the first token: reading the prompt; None if unknown.
    """

    token_time_s: float | None
    mean_batch: float
    completion_tokens: int
    prompt_tokens: int
    waited_s: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """An endpoint's curve as far as it is known.

    Attributes:
        standard_errors: by field of the curve; absent where it is unknown or given.
        reason: why the curve is not identifiable; empty if it is.
        intervals: number of intervals that it was learned from.
        mean_batch: sequences in a step, on average.
    """

    curve: BatchCurve
    standard_errors: Mapping[str, float]
    reason: str
    intervals: int
    mean_batch: float
    mean_prompt_tokens: float

    @property
    def identifiable(self) -> bool:
        """Whether shared and single energy can be separated."""
        return not self.reason


class Totals(State):
    """Sums over intervals and calls, forgotten like those of the regressions.

    Attributes:
        tokens_by_batch: tokens x their interval's mean batch.
    """

    length_s: float = 0.0
    idle_s: float = 0.0
    steps: float = 0.0
    tokens: float = 0.0
    tokens_by_batch: float = 0.0
    calls: float = 0.0
    prompt_tokens: float = 0.0


class CurveState(State):
    """What an endpoint's curve is computed from: sums, and no observations.

    Attributes:
        at_s: event time up to which it has learned; None before the first interval.
        energy: regressors length, steps, tokens, prompt tokens; weighted by 1 / length.
        step: regressors 1, mean batch; value: time per token; weighted by tokens.
        prompt: regressors 1, prompt tokens; value: time until the first token's step.
        intervals: number of intervals with work.
        calls: number of calls with a known time per token.
        awake: the model was loaded at the end of the last interval.
        still_s: length of the present span in which tokens were generated and the meter stood still.
    """

    at_s: float | None = None
    energy: LeastSquares = LeastSquares.empty(4)
    step: LeastSquares = LeastSquares.empty(2)
    prompt: LeastSquares = LeastSquares.empty(2)
    totals: Totals = Totals()
    intervals: int = 0
    calls: int = 0
    awake: bool | None = None
    still_s: float = 0.0

    @property
    def speed(self) -> Speed | None:
        """Time of a step by batch size; None until enough calls are known. Right at the batches that were seen."""
        if self.calls < MIN_CALLS:
            return None
        step_s, token_s = self.step.solve().values
        return Speed(step_s, token_s) if step_s > 0 else None

    def learned(
        self, intervals: Sequence[IntervalSample], calls: Sequence[CallSample], *, until_s: float, half_life_s: float
    ) -> "CurveState":
        """The state after more intervals and calls.

        Args:
            until_s: event time up to which all intervals are known.
            half_life_s: event time after which an observation counts half.
        """
        share = 1.0 if self.at_s is None else 0.5 ** (max(0.0, until_s - self.at_s) / half_life_s)
        known = intervals if self.speed is not None else ()
        timed = [(one, one.token_time_s) for one in calls if one.token_time_s is not None and one.mean_batch > 0]
        worked = sum(1 for one in known if one.work.steps > 0)
        prompts = [(1.0, float(one.prompt_tokens), one.waited_s) for one in calls if one.waited_s is not None]
        return CurveState(
            at_s=until_s,
            energy=self.energy.forgotten(share).with_rows(
                [
                    (one.length_s, one.work.steps, one.work.tokens, one.work.prompt_tokens, one.metered_j)
                    for one in known
                ],
                [1.0 / one.length_s for one in known],
                # Idle intervals deviate less; they must not make the others look exact.
                counted=worked,
            ),
            step=self.step.forgotten(share).with_rows(
                [(1.0, one.mean_batch, token_time_s) for one, token_time_s in timed],
                [float(one.completion_tokens - 1) for one, _ in timed],
            ),
            prompt=self.prompt.forgotten(share).with_rows(prompts, [1.0] * len(prompts)),
            totals=_added(self.totals, share, known, calls),
            intervals=self.intervals + worked,
            calls=self.calls + len(timed),
            awake=self.awake,
            still_s=self.still_s,
        )

    def estimate(self, *, idle_power_w: float | None) -> Estimate | None:
        """The curve.

        Args:
            idle_power_w: idle power if it is known otherwise.

        Returns:
            None until the speed is known.
        """
        speed = self.speed
        if speed is None:
            return None
        step = self.step.solve()
        prompt = self.prompt.solve()
        prompt_token_s, prompt_error_s = prompt.values[1], prompt.errors[1]
        energy = self._energy(idle_power_w)
        values = {
            **dict(zip(("idle_w", "step_j", "token_j", "prompt_token_j"), energy.values, strict=True)),
            "step_s": speed.step_s,
            "token_s": speed.token_s,
            "prompt_token_s": prompt_token_s if prompt_token_s > _SIGNIFICANT * prompt_error_s else 0.0,
        }
        errors = {
            **dict(zip(("idle_w", "step_j", "token_j", "prompt_token_j"), energy.errors, strict=True)),
            **dict(zip(("step_s", "token_s"), step.errors, strict=True)),
            "prompt_token_s": prompt_error_s,
        }
        if idle_power_w is not None:
            del errors["idle_w"]
        totals = self.totals
        return Estimate(
            curve=BatchCurve(**values),
            standard_errors={
                name: float(np.hypot(error, MODEL_ERROR * values[name]))
                for name, error in errors.items()
                if np.isfinite(error)
            },
            reason=self._reason(values, errors, idle_known=idle_power_w is not None),
            intervals=self.intervals,
            mean_batch=totals.tokens / totals.steps if totals.steps > 0 else 0.0,
            mean_prompt_tokens=totals.prompt_tokens / totals.calls if totals.calls > 0 else 0.0,
        )

    def _energy(self, idle_power_w: float | None) -> Coefficients:
        """Idle power, and the energy of steps, tokens and prompt tokens.

        Prompts cost nothing unless the observations show that they do; the standard errors do not assume it, unless
        the cost of a prompt token cannot be separated from that of a generated one.
        """
        regression = self.energy if idle_power_w is None else self.energy.fixing(0, idle_power_w)
        found = regression.solve()
        if not found.values[-1] > _SIGNIFICANT * found.errors[-1]:
            without = regression.fixing(len(found.values) - 1, 0.0).solve()
            separable = found.errors[-1] < without.values[-1]
            found = Coefficients(
                (*without.values, 0.0), found.errors if separable else (*without.errors, found.errors[-1])
            )
        if idle_power_w is None:
            return found
        return Coefficients((idle_power_w, *found.values), (0.0, *found.errors))

    def _reason(self, values: Mapping[str, float], errors: Mapping[str, float], *, idle_known: bool) -> str:
        if self.intervals < MIN_INTERVALS:
            return f"too few intervals: {self.intervals} of {MIN_INTERVALS}"
        totals = self.totals
        mean = totals.tokens / totals.steps
        variance = max(0.0, totals.tokens_by_batch / totals.steps - mean**2)
        if variance**0.5 < MIN_BATCH_VARIATION * mean:
            return f"the batch was always about {mean:.1f}"
        if not idle_known and totals.idle_s < MIN_IDLE_SHARE * totals.length_s:
            return "no idle time was seen"
        scales = {
            "step_j": values["step_j"] + values["token_j"],
            "token_j": values["token_j"] + values["step_j"] / USUAL_BATCH,
            "step_s": values["step_s"] + values["token_s"],
            "token_s": values["token_s"] + values["step_s"] / USUAL_BATCH,
        }
        if not idle_known:
            scales["idle_w"] = values["idle_w"]
        large = [name for name, scale in scales.items() if not errors[name] <= LARGEST_ERROR * scale]
        return f"still too uncertain: {', '.join(large)}" if large else ""


def _added(totals: Totals, share: float, intervals: Sequence[IntervalSample], calls: Sequence[CallSample]) -> Totals:
    """The sums with what is new."""
    return Totals(
        length_s=totals.length_s * share + sum(one.length_s for one in intervals),
        idle_s=totals.idle_s * share + sum(one.idle_s for one in intervals),
        steps=totals.steps * share + sum(one.work.steps for one in intervals),
        tokens=totals.tokens * share + sum(one.work.tokens for one in intervals),
        tokens_by_batch=totals.tokens_by_batch * share
        + sum(one.work.tokens**2 / one.work.steps for one in intervals if one.work.steps > 0),
        calls=totals.calls * share + len(calls),
        prompt_tokens=totals.prompt_tokens * share + sum(one.prompt_tokens for one in calls),
    )

"""Power and speed of a model server by batch size.

A server with in-flight batching generates in steps: each step produces one token for every sequence in the batch. For a
batch of B sequences, a step takes `step_s + token_s * B` seconds and, on top of the idle power, `step_j + token_j * B`
joules. Most of a step is shared by the batch (reading the weights), so a token costs least in a full batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCurve:
    """Power and speed of one model server.

    Attributes:
        idle_w: power while nothing runs, W; energy of steps and tokens comes on top of it.
        step_j: energy of a step that its sequences share, J.
        token_j: energy of each sequence in a step, J: of one generated token.
        step_s: shared time of a step, seconds.
        token_s: time that each sequence adds to a step, seconds.
        prompt_token_j: energy of reading one token of a prompt, J.
        prompt_token_s: time of reading one token of a prompt, seconds.
        asleep_w: power while the model is unloaded, W.
    """

    idle_w: float
    step_j: float
    token_j: float
    step_s: float
    token_s: float
    prompt_token_j: float = 0.0
    prompt_token_s: float = 0.0
    asleep_w: float = 0.0

    def __post_init__(self) -> None:
        for name in ("idle_w", "step_j", "token_j", "token_s", "prompt_token_j", "prompt_token_s", "asleep_w"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name!r} must be a number that is not negative, got {value}")
        if not (math.isfinite(self.step_s) and self.step_s > 0):
            raise ValueError(f"'step_s' must be greater than 0, got {self.step_s}")

    def step_time_s(self, batch: float) -> float:
        """Time of a step, seconds; also the time per output token of every sequence in the batch."""
        return self.step_s + self.token_s * batch

    def step_energy_j(self, batch: float) -> float:
        """Energy of a step on top of the idle power, J."""
        return self.step_j + self.token_j * batch

    def tokens_per_s(self, batch: float) -> float:
        """Tokens generated per second by all sequences of a constant batch."""
        return batch / self.step_time_s(batch)

    def power_w(self, batch: float) -> float:
        """Power at a constant batch, idle power included, W."""
        if batch <= 0:
            return self.idle_w
        return self.idle_w + self.step_energy_j(batch) / self.step_time_s(batch)

    def average_token_j(self, batch: float) -> float:
        """Energy per generated token at a constant batch, idle power included, J."""
        return self.power_w(batch) / self.tokens_per_s(batch)

    def poisson_power_w(self, mean_batch: float) -> float:
        """Expected power where the number of sequences is Poisson distributed, idle power included, W."""
        return sum(share * self.power_w(n) for n, share in _poisson(mean_batch))

    def poisson_tokens_per_s(self, mean_batch: float) -> float:
        """Expected tokens per second where the number of sequences is Poisson distributed."""
        return sum(share * self.tokens_per_s(n) for n, share in _poisson(mean_batch))

    def marginal_token_j(self, mean_batch: float) -> float:
        """Energy that one more generated token adds on a server that runs anyway, J.

        It is the derivative of the expected power by the expected token rate, both as functions of the mean of a
        Poisson distributed number of sequences. The derivative of E[f(N)] by that mean is E[f(N + 1) - f(N)].

        It is `step_j + token_j` on an idle server, where every token is a step of its own, and tends to
        `token_j - step_j * token_s / step_s` on a busy one, where one more sequence shares the steps but slows them
        down. It is negative if power falls with the batch.

        Args:
            mean_batch: mean number of sequences, idle times included.
        """
        power_w = tokens_per_s = 0.0
        for n, share in _poisson(mean_batch):
            power_w += share * (self.power_w(n + 1) - self.power_w(n))
            tokens_per_s += share * (self.tokens_per_s(n + 1) - self.tokens_per_s(n))
        return power_w / tokens_per_s

    def largest_batch(self, *, tpot_s: float | None, ttft_s: float | None = None, prompt_tokens: float = 0.0) -> int:
        """The largest batch that keeps a latency objective; 0 if no batch keeps it.

        Args:
            tpot_s: most seconds per output token; None for no limit.
            ttft_s: most seconds until the first token: reading the prompt and one step; None for no limit.
            prompt_tokens: usual length of a prompt.

        Raises:
            ValueError: neither limit is given.
        """
        limits = [limit for limit in (tpot_s, None if ttft_s is None else ttft_s - prompt_tokens * self.prompt_token_s)
                  if limit is not None]  # fmt: skip
        if not limits:
            raise ValueError("give 'tpot_s' or 'ttft_s'")
        spare_s = min(limits) - self.step_s
        if spare_s < self.token_s:
            return 0
        # A nanosecond of tolerance, because the objective may be computed from the curve itself.
        return int((spare_s + 1e-9) / self.token_s) if self.token_s > 0 else 1_000_000

    def stretched(self, factor: float) -> "BatchCurve":
        """The curve of a server whose steps take `factor` times as long at the same power."""
        return BatchCurve(
            idle_w=self.idle_w,
            step_j=self.step_j * factor,
            token_j=self.token_j * factor,
            step_s=self.step_s * factor,
            token_s=self.token_s * factor,
            prompt_token_j=self.prompt_token_j * factor,
            prompt_token_s=self.prompt_token_s * factor,
            asleep_w=self.asleep_w,
        )


def mean_curve(curves: Sequence[BatchCurve]) -> BatchCurve:
    """The curve whose every field is the mean of those of some servers.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("give at least one curve")
    return BatchCurve(
        **{one.name: sum(getattr(curve, one.name) for curve in curves) / len(curves) for one in fields(BatchCurve)}
    )


def _poisson(mean: float) -> Iterator[tuple[int, float]]:
    """The numbers that are likely under a Poisson distribution, each with its probability.

    Raises:
        ValueError: the mean is negative.
    """
    if not mean >= 0.0:
        raise ValueError(f"the mean batch must not be negative, got {mean}")
    if mean == 0.0:
        yield 0, 1.0
        return
    # Ten standard deviations, and for small means the long upper tail.
    spread = 10.0 * math.sqrt(mean) + 10.0
    for n in range(max(0, int(mean - spread)), int(mean + spread) + 1):
        yield n, math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))


def measured(
    *, idle_w: float, asleep_w: float, step_j: float, token_j: float, step_s: float, token_s: float
) -> BatchCurve:
    """A curve from measured step energies, which include the idle power while the step runs."""
    return BatchCurve(
        idle_w=idle_w,
        asleep_w=asleep_w,
        step_j=step_j - idle_w * step_s,
        token_j=token_j - idle_w * token_s,
        step_s=step_s,
        token_s=token_s,
    )


MEASURED: Final[Mapping[str, BatchCurve]] = {
    "qwen3-14b-h100": measured(
        idle_w=100.0, asleep_w=10.0, step_j=4.899, token_j=0.0920, step_s=0.01189, token_s=0.0001314
    ),
    "llama-3.1-8b-h100": measured(
        idle_w=100.0, asleep_w=10.0, step_j=3.129, token_j=0.0676, step_s=0.00676, token_s=0.0000868
    ),
    "llama-3.3-70b-4xh100": measured(
        idle_w=400.0, asleep_w=40.0, step_j=27.57, token_j=0.3860, step_s=0.01642, token_s=0.0001318
    ),
}
"""Curves fitted to measurements of the ML.ENERGY leaderboard v3 (vLLM, chat prompts, bfloat16; batches of 8 to 256).

Power and tokens per second agree with the measured ones within 3 % at batches of 8, 32 and 128. The leaderboard gives
no power of an idle or sleeping server: 100 W and 10 W per GPU are assumptions.
"""

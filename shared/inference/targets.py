"""The target batch of every endpoint of a pool: how many requests at once it is to have, of all routers together."""

from dataclasses import fields

from shared.batch_curve import BatchCurve
from shared.messages import EndpointCurve
from shared.pools import Pool
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class TargetBatches:
    """The targets of one pool: the fixed number, or what its latency objectives and the learned curves allow.

    An endpoint keeps its last identifiable curve: at a constant batch a good curve stops being identifiable. An
    endpoint without one is assumed to be like the mean of the others.

    Attributes:
        by_endpoint: the targets; empty while they are unknown.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._curves: dict[str, EndpointCurve] = {}
        self._warned = False
        fixed = pool.target_batch
        self.by_endpoint = {} if fixed is None else dict.fromkeys((one.name for one in pool.endpoints), fixed)

    def update(self, curve: EndpointCurve) -> None:
        """Take a learned curve of one of the pool's endpoints into account."""
        if not curve.identifiable or curve.endpoint not in {one.name for one in self._pool.endpoints}:
            return
        self._curves[curve.endpoint] = curve
        mean = _mean([one.curve() for one in self._curves.values()])
        prompt_tokens = sum(one.mean_prompt_tokens for one in self._curves.values()) / len(self._curves)
        for endpoint in self._pool.endpoints:
            own = self._curves.get(endpoint.name)
            target = (
                self._pool.target_for(mean, prompt_tokens=prompt_tokens)
                if own is None
                else self._pool.target_for(own.curve(), prompt_tokens=own.mean_prompt_tokens)
            )
            if target is not None:
                self.by_endpoint[endpoint.name] = target
        self._warn_if_unattainable(mean, prompt_tokens)

    def _warn_if_unattainable(self, curve: BatchCurve, prompt_tokens: float) -> None:
        """Warn, once, that not even a batch of one keeps the objectives."""
        pool = self._pool
        if (
            self._warned
            or pool.target_batch is not None
            or (pool.tpot_objective_ms, pool.ttft_objective_ms) == (None,) * 2
        ):
            return
        tpot_s = curve.step_time_s(1)
        ttft_s = tpot_s + prompt_tokens * curve.prompt_token_s
        if curve.largest_batch(
            tpot_s=_seconds(pool.tpot_objective_ms),
            ttft_s=_seconds(pool.ttft_objective_ms),
            prompt_tokens=prompt_tokens,
        ):
            return
        self._warned = True
        _log.warning(
            "no batch keeps the latency objectives: endpoints get one request at a time, then more where they must; "
            "raise tpot_objective_ms or ttft_objective_ms in the fleet file",
            pool=pool.name,
            tpot_objective_ms=pool.tpot_objective_ms,
            tpot_of_one_request_ms=round(1e3 * tpot_s, 2),
            ttft_objective_ms=pool.ttft_objective_ms,
            ttft_of_one_request_ms=round(1e3 * ttft_s, 2),
        )


def _mean(curves: list[BatchCurve]) -> BatchCurve:
    return BatchCurve(
        **{one.name: sum(getattr(curve, one.name) for curve in curves) / len(curves) for one in fields(BatchCurve)}
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1_000.0

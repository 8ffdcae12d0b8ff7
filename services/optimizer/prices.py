"""What a token costs in a pool: what its pool's meter will show, where the power curve of its endpoints is known.

Where capacity follows the load, fewer tokens mean fewer servers, so a token costs its share of a full batch, idle power
included. Elsewhere the servers run anyway, so it costs what one more token adds at the present load. Without a curve
the energy attributed to earlier calls is used. All three are joules of the same meters, so pools with and without a
curve are compared as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.optimizer.costs import Consumption
from services.optimizer.settings import OptimizerSettings
from shared.batch_curve import BatchCurve, mean_curve
from shared.fleet import Fleet
from shared.messages import EndpointCurve, PoolPrice, split_option
from shared.pools import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCurve:
    """The mean power curve of a pool's endpoints.

    Attributes:
        curve: None while no endpoint's curve is known.
        prompt_tokens: mean length of a prompt.
        problem: why there is no curve.
    """

    curve: BatchCurve | None = None
    prompt_tokens: float = 0.0
    problem: str = ""

    def target_batch(self, pool: Pool) -> int | None:
        """Sequences that an endpoint is to have; None while that is unknown."""
        return pool.target_for(self.curve, prompt_tokens=self.prompt_tokens)

    def missed_objective(self, pool: Pool) -> str | None:
        """Says so if even a single sequence exceeds the pool's latency objectives; None if not, or if unknown."""
        objectives = {"tpot_objective_ms": pool.tpot_objective_ms, "ttft_objective_ms": pool.ttft_objective_ms}
        given = {name: limit for name, limit in objectives.items() if limit is not None}
        if self.curve is None or pool.target_batch is not None or not given:
            return None
        tpot_s, ttft_s = (None if limit is None else limit / 1_000.0 for limit in objectives.values())
        if self.curve.largest_batch(tpot_s=tpot_s, ttft_s=ttft_s, prompt_tokens=self.prompt_tokens) > 0:
            return None
        named = " and ".join(f"{name} = {limit:g}" for name, limit in given.items())
        return f"no batch keeps {named}: a step takes {1_000.0 * self.curve.step_time_s(1):.3g} ms for one sequence"


class PoolPrices:
    """Power curves and present load of every pool, and the prices that follow from them.

    Attributes:
        load: mean number of sequences on an awake endpoint, by pool; a pool whose load is unknown is missing.
    """

    def __init__(self, fleet: Fleet) -> None:
        """Start without curves."""
        self.load: dict[str, float] = {}
        self._fleet = fleet
        self._curves: dict[str, EndpointCurve] = {}

    def update_curves(self, messages: Iterable[EndpointCurve]) -> bool:
        """Store the newest curve of every endpoint; returns whether any was stored.

        An identified curve is kept, as in the routers: at a constant batch a good curve stops being identifiable.
        """
        stored = False
        for message in messages:
            known = self._curves.get(message.endpoint)
            if known is not None and known.pool == message.pool and known.identifiable and not message.identifiable:
                continue
            if known is None or message.at >= known.at:
                self._curves[message.endpoint] = message
                stored = True
        return stored

    def curve_of(self, pool: Pool) -> PoolCurve:
        """The mean curve of a pool's endpoints whose curves could be identified."""
        known = [
            curve
            for endpoint in pool.endpoints
            if (curve := self._curves.get(endpoint.name)) is not None and curve.pool == pool.name
        ]
        if not known:
            return PoolCurve(problem="no power curve of its endpoints is known yet")
        usable = [one for one in known if one.identifiable]
        if not usable:
            return PoolCurve(problem=f"its power curve cannot be identified: {known[0].reason or 'no reason given'}")
        return PoolCurve(
            curve=mean_curve([one.curve() for one in usable]),
            prompt_tokens=sum(one.mean_prompt_tokens for one in usable) / len(usable),
        )

    def of_model(
        self, model: str, consumption: Consumption, *, now_s: float, settings: OptimizerSettings
    ) -> dict[str, PoolPrice]:
        """Price of every pool of a model.

        Args:
            model: name of the model.
            consumption: of the model; the load follows from it where no load is reported.
            now_s: event time.
            settings: half-lives.
        """
        pools = self._fleet.pools_of(model)
        estimated = _estimated_loads(pools, consumption, now_s=now_s, settings=settings)
        return {pool.name: pool_price(pool, self.curve_of(pool), self._load(pool, estimated)) for pool in pools}

    def _load(self, pool: Pool, estimated: Mapping[str, float]) -> float:
        return self.load.get(pool.name, estimated[pool.name])


def pool_price(pool: Pool, known: PoolCurve, load: float) -> PoolPrice:
    """What a token costs in a pool.

    Args:
        pool: of the fleet.
        known: its curve.
        load: mean number of sequences on an awake endpoint.
    """
    curve = known.curve
    if curve is None:
        return _attributed(known.problem)
    if pool.capacity_follows_load:
        target = known.target_batch(pool)
        if target is None:
            return _attributed("it has no target batch: set target_batch or tpot_objective_ms")
        # A prompt keeps one of the batch's places while it is read.
        prompt_s = curve.prompt_token_s / target
        return PoolPrice(
            basis="average",
            batch=target,
            token_j=curve.average_token_j(target),
            prompt_token_j=curve.prompt_token_j + curve.idle_w * prompt_s,
            server_token_s=curve.step_time_s(target) / target,
            server_prompt_token_s=prompt_s,
            meter_token_j=curve.average_token_j(target),
            reason=known.missed_objective(pool) or "capacity follows the load, so fewer tokens need fewer servers",
        )
    marginal_j, tokens_per_s = curve.marginal_token_j(load), curve.poisson_tokens_per_s(load)
    reason = "its servers run anyway, so a token costs what one more adds"
    if marginal_j < 0.0:
        reason += f" (the curve says {marginal_j:.3g} J, less than nothing)"
    return PoolPrice(
        basis="marginal",
        batch=load,
        token_j=max(0.0, marginal_j),
        prompt_token_j=curve.prompt_token_j,
        # A shorter answer takes no server away.
        server_token_s=0.0,
        server_prompt_token_s=0.0,
        meter_token_j=curve.poisson_power_w(load) / tokens_per_s if tokens_per_s > 0.0 else None,
        reason=reason,
    )


def request_energy_j(price: PoolPrice, *, completion_tokens: float, prompt_tokens: float) -> float:
    """Joules that a request adds to its pool's meter; the price must not be `attributed`."""
    return completion_tokens * (price.token_j or 0.0) + prompt_tokens * (price.prompt_token_j or 0.0)


def request_server_s(price: PoolPrice, *, completion_tokens: float, prompt_tokens: float) -> float:
    """Server time that a request adds, seconds; the price must not be `attributed`."""
    return completion_tokens * (price.server_token_s or 0.0) + prompt_tokens * (price.server_prompt_token_s or 0.0)


def without_tokens(price: PoolPrice, problem: str) -> PoolPrice:
    """The price to use where too few generated tokens are known."""
    return price if price.basis == "attributed" else _attributed(problem)


def without_prompts(price: PoolPrice) -> PoolPrice:
    """The price to use where the length of prompts is not known: reading them is left out."""
    if not (price.prompt_token_j or price.server_prompt_token_s):
        return price
    reason = f"{price.reason}; the length of the prompts is not known, so reading them is left out"
    return price.model_copy(update={"prompt_token_j": None, "server_prompt_token_s": None, "reason": reason})


def describe_price(pool: str, price: PoolPrice) -> str:
    """A pool's price in words."""
    if price.basis == "attributed" or price.token_j is None:
        return f"a request in {pool} costs the energy attributed to earlier ones: {price.reason}"
    cost = f"a token in {pool} costs {price.token_j:.3g} J, {price.basis} at batch {price.batch or 0.0:.3g}"
    if price.basis == "marginal" and price.meter_token_j:
        cost += f", of {price.meter_token_j:.3g} J on the meter per token"
    return f"{cost}: {price.reason}"


def _attributed(reason: str) -> PoolPrice:
    return PoolPrice(basis="attributed", reason=reason)


def _estimated_loads(
    pools: Sequence[Pool], consumption: Consumption, *, now_s: float, settings: OptimizerSettings
) -> dict[str, float]:
    """Mean number of sequences on an endpoint by pool: request rate times processing time (Little's law)."""
    requests, seconds = 0.0, {pool.name: 0.0 for pool in pools}
    for row in consumption.totals(now_s, settings).values():
        for option, used in row.items():
            pool, _ = split_option(option)
            requests += used.requests
            if pool in seconds:
                seconds[pool] += used.processing_s
    rate = consumption.requests_per_s(now_s, settings) / requests if requests > 0.0 else 0.0
    return {pool.name: rate * seconds[pool.name] / len(pool.endpoints) for pool in pools}

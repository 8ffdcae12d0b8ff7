"""Producers send what is no request."""

from shared.messages import GenerationRequest
from tests.drills.malformed import KINDS, Malformed
from tests.drills.malformed import malformed as made
from tests.drills.run import Run

REFUSED_SHARE = 0.05
"""Of the valid requests: they ask for a model that is not served, and are to be answered with an error."""


async def malformed(run: Run) -> None:
    """As many malformed messages as good ones, shuffled; a few good ones ask for what there is not."""
    await run.serve()
    good = run.requests(2_000)
    refused = set(run.rng.sample(range(len(good)), round(REFUSED_SHARE * len(good))))
    messages: list[GenerationRequest | Malformed] = [
        request.model_copy(update={"model": "nobody-serves-this"}) if number in refused else request
        for number, request in enumerate(good)
    ]
    bad = made(run.rng, run.number(2_000))
    messages += bad
    run.rng.shuffle(messages)
    kinds = min(len(bad), len(KINDS))
    run.note(f"{len(bad)} malformed messages of {kinds} kinds; {len(refused)} requests for an unknown model")
    run.flow(messages)

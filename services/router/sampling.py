"""Which requests become samples for the evaluator."""

from shared.hashing import uniform
from shared.messages import Decision, GenerationRequest

_SALT = "sample"


def becomes_sample(request_id: str, request: GenerationRequest, decision: Decision, *, share: float) -> bool:
    """Whether a request is kept aside.

    A share of the traffic, drawn by the request's id, so that a redelivered request decides the same. The producer
    can opt out; a request with a forced level is left out, because its sender may favour some kind of prompt.
    """
    if not request.evaluation_allowed or decision.source == "forced":
        return False
    return uniform(_SALT, request_id) < share

"""Why a generation failed, in the three ways that a caller treats differently."""


class GenerationError(RuntimeError):
    """A generation failed; the message names the endpoint and never quotes the prompt."""


class EndpointUnavailable(GenerationError):  # noqa: N818 - the state, not the exception, is what callers speak of
    """The endpoint is down, refuses, or failed on its own account: another one may do better."""


class InvalidRequest(GenerationError):  # noqa: N818
    """The request itself is at fault: it would fail everywhere."""


class DeadlineExceeded(GenerationError):  # noqa: N818
    """The time that was given is over."""

"""Why a generation failed, in the three ways that a caller treats differently."""


class GenerationError(RuntimeError):
    """A generation failed; the text names the endpoint and never quotes the prompt.

    Attributes:
        said: the model server's own words about a prompt; they may quote it, so they are for who asked, not for a log.
    """

    def __init__(self, text: str, *, said: str = "") -> None:
        super().__init__(text)
        self.said = said

    @property
    def for_requester(self) -> str:
        """The text with the server's words."""
        return f"{self}: {self.said}" if self.said else str(self)


class EndpointUnavailable(GenerationError):  # noqa: N818 - the state, not the exception, is what callers speak of
    """The endpoint is down, refuses, or failed on its own account: another one may do better."""


class InvalidRequest(GenerationError):  # noqa: N818
    """The request itself is at fault: it would fail everywhere."""


class DeadlineExceeded(GenerationError):  # noqa: N818
    """The time that was given is over."""

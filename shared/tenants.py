"""Defaults of a tenant's requests: `[[tenants]]` of the fleet file.

```toml
[[tenants]]
name = "support-desk"             # as requests name it in `tenant`
model = "llama-2-13b-chat"        # default: the fleet's first
system = "Answer customers."      # for a conversation without a system message, or with a blank one
directive = "L1"                  # fixed level; default "optimize": the policy draws one
deadline_s = 20                   # after the request was received, event seconds; never extended
max_in_flight = 100               # at once in one router; default: no limit
sampling = { max_tokens = 256, temperature = 0.2 }
sampled = false                   # its prompts are never kept for evaluation; default: true
```

A value in the request takes precedence, except over `sampled = false`. `null`, and an empty `stop`, count as not set;
`max_tokens` counts as set whenever the request contains it.
"""

from datetime import datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.messages import ChatMessage, GenerationRequest, Identifier, Level, SamplingParameters

OPTIMIZE: Literal["optimize"] = "optimize"


class SamplingDefaults(SamplingParameters):
    """Sampling parameters for requests that do not set them; only those in the file apply."""

    model_config = ConfigDict(extra="forbid")


class Tenant(BaseModel):
    """The defaults of one tenant's requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Identifier = Field(description="As requests name it in `tenant`")
    model: Identifier | None = Field(default=None, description="Logical model; default: the fleet's first")
    system: str | None = Field(
        default=None, min_length=1, description="System message of a conversation without one; the directive follows it"
    )
    directive: Level | Literal["optimize"] = Field(
        default=OPTIMIZE, description="Fixed level; optimize: the policy draws one"
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        description="After the request was received, event; default: SPROUT_ROUTER_DEFAULT_DEADLINE_S",
    )
    max_in_flight: int | None = Field(
        default=None, ge=1, description="Concurrent requests of one router; others wait; absent: unlimited"
    )
    sampling: SamplingDefaults = Field(default_factory=SamplingDefaults)
    sampled: bool = Field(default=True, description="False: no prompt of the tenant is kept for evaluation")

    def deadline(self, received_at: datetime) -> datetime | None:
        """The deadline of a request without one, event time; `None`: the router's default."""
        return None if self.deadline_s is None else received_at + timedelta(seconds=self.deadline_s)


def with_defaults(request: GenerationRequest, tenant: Tenant | None) -> GenerationRequest:
    """The request, completed with its tenant's defaults.

    Args:
        tenant: `None` for an unknown one.
    """
    if tenant is None:
        return request
    changes: dict[str, Any] = {}
    if request.model is None and tenant.model is not None:
        changes["model"] = tenant.model
    if request.directive is None and tenant.directive != OPTIMIZE:
        changes["directive"] = tenant.directive
    if not tenant.sampled:
        changes["evaluation_allowed"] = False
    turns = request.conversation()
    if tenant.system is not None and not any(turn.role == "system" and _is_visible(turn.content) for turn in turns):
        others = (turn for turn in turns if turn.role != "system")
        changes |= {"prompt": None, "messages": (ChatMessage(role="system", content=tenant.system), *others)}
    missing = tenant.sampling.model_fields_set - _set_fields(request.sampling)
    if missing:
        values = {name: getattr(tenant.sampling, name) for name in missing}
        changes["sampling"] = request.sampling.model_copy(update=values)
    return request.model_copy(update=changes) if changes else request


def _is_visible(text: str) -> bool:
    """Whether a text has more than white space and invisible characters: a blank message replaces no default."""
    return any(character.isprintable() and not character.isspace() for character in text)


def _set_fields(sampling: SamplingParameters) -> set[str]:
    return {name for name in sampling.model_fields_set if getattr(sampling, name) not in (None, ())}

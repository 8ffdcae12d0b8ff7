"""What a tenant's requests are given where they do not say: `[[tenants]]` of the fleet file.

```toml
[[tenants]]
name = "support-desk"             # as requests name it in `tenant`
model = "llama-2-13b-chat"        # default: the fleet's first
system = "Answer customers."      # for a conversation without a system message
directive = "L1"                  # a level that is forced; default "optimize": the policy draws one
deadline_s = 20                   # event seconds from the receipt, kept to the letter
sampling = { max_tokens = 256, temperature = 0.2 }
```

A request always has the last word. A field that is null, and `stop` when it is empty, says nothing; `max_tokens` says
something whenever it is sent.
"""

from datetime import datetime, timedelta
from typing import Any, Literal

from pydantic import ConfigDict, Field

from shared.fleet_parts import FleetPart
from shared.messages import ChatMessage, GenerationRequest, SamplingParameters
from shared.messages.base import Identifier, Level

OPTIMIZE: Literal["optimize"] = "optimize"


class SamplingDefaults(SamplingParameters):
    """Sampling parameters for requests that do not set them; only those that are given count."""

    model_config = ConfigDict(extra="forbid")


class Tenant(FleetPart):
    """The defaults of one tenant's requests."""

    name: Identifier = Field(description="As requests name it in `tenant`")
    model: Identifier | None = Field(default=None, description="Logical model; default: the fleet's first")
    system: str | None = Field(
        default=None, min_length=1, description="System message of a conversation that has none, before the directive"
    )
    directive: Level | Literal["optimize"] = Field(
        default=OPTIMIZE, description="A level that is forced; optimize: the policy draws one"
    )
    deadline_s: float | None = Field(
        default=None, gt=0, description="From the receipt, event; default: SPROUT_ROUTER_DEFAULT_DEADLINE_S"
    )
    sampling: SamplingDefaults = Field(default_factory=SamplingDefaults)

    def deadline(self, received_at: datetime) -> datetime | None:
        """The deadline of a request that has none, event time; null: the router's own default."""
        return None if self.deadline_s is None else received_at + timedelta(seconds=self.deadline_s)


def with_defaults(request: GenerationRequest, tenant: Tenant | None) -> GenerationRequest:
    """The request, with its tenant's defaults where it says nothing; an unknown tenant has none."""
    if tenant is None:
        return request
    changes: dict[str, Any] = {}
    if request.model is None and tenant.model is not None:
        changes["model"] = tenant.model
    if request.directive is None and tenant.directive != OPTIMIZE:
        changes["directive"] = tenant.directive
    turns = request.conversation()
    if tenant.system is not None and not any(turn.role == "system" for turn in turns):
        changes |= {"prompt": None, "messages": (ChatMessage(role="system", content=tenant.system), *turns)}
    wanted = tenant.sampling.model_fields_set - _said(request.sampling)
    if wanted:
        values = {name: getattr(tenant.sampling, name) for name in wanted}
        changes["sampling"] = request.sampling.model_copy(update=values)
    return request.model_copy(update=changes) if changes else request


def _said(sampling: SamplingParameters) -> set[str]:
    return {name for name in sampling.model_fields_set if getattr(sampling, name) not in (None, ())}

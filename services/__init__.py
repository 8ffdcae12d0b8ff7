"""The Sprout services, and the registry of them: a new service is one entry here and a package of its own.

`python -m services NAME` runs one. A package `services/NAME` has a module `app` with `build_app()`, which returns the
FastStream application without connecting, and `main()`, which runs it until it is stopped. An image contains the
package of one service only, so nothing is imported before it is used.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How to run and describe a service.

    Attributes:
        name: of its package.
        description: one sentence, for people and for the AsyncAPI document.
        needs_database: whether it has a schema in PostgreSQL.
        example_environment: variables without a default that `build_app` needs, beside a fleet file with a pool and a
            judge in zone `EXAMPLE`; for generating the AsyncAPI document.
    """

    name: str
    description: str
    needs_database: bool = False
    example_environment: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> ModuleType:
        """The module with `build_app` and `main`.

        Raises:
            ModuleNotFoundError: the package is not installed here.
        """
        return importlib.import_module(f"services.{self.name}.app")


SERVICES: Final[Mapping[str, Service]] = {
    service.name: service
    for service in (
        Service(
            name="carbon_feed",
            description="Publishes the carbon intensity of every zone of the fleet.",
            example_environment={
                "SPROUT_CARBON_FEED_PROVIDERS": '{"EXAMPLE": [{"kind": "constant", "intensity_g_per_kwh": 0}]}'
            },
        ),
        Service(
            name="evaluator",
            description="Judges sampled prompts under every directive and learns prompt groups from the verdicts.",
            needs_database=True,
        ),
        Service(
            name="gateway",
            description="Answers HTTP requests in OpenAI's format, and says how much carbon each answer took.",
            needs_database=True,
        ),
        Service(
            name="ledger",
            description="Attributes metered energy and carbon to every call on a model server.",
            needs_database=True,
        ),
        Service(
            name="optimizer",
            description="Solves for the directive probabilities that minimise carbon within the quality limits.",
            needs_database=True,
        ),
        Service(
            name="router",
            description="Draws a generation directive for every request, has a model answer it, publishes the answer.",
        ),
    )
}

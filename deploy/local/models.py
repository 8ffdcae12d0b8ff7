"""What the local stack needs to know of its model servers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from deploy.local.config import StackConfig
from deploy.local.fleet import LocalFleet
from deploy.local.java import Say
from deploy.local.processes import ProcessSpec

MODEL_TIER = 1
"""Stopped after the services that use it, before the broker."""


class ModelServerError(RuntimeError):
    """The model servers could not be installed or prepared; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModels:
    """Model servers that are ready to be started.

    Attributes:
        description: what is served, in words for people.
    """

    process: ProcessSpec
    fleet: LocalFleet
    description: str


class ModelServers(Protocol):
    """Installs and prepares the servers of the model and the judge."""

    def install(self, config: StackConfig, say: Say) -> None:
        """Fetch what is missing, once, below the install folder.

        Raises:
            ModelServerError: it could not be fetched.
        """
        ...

    def prepare(self, config: StackConfig, clock: Mapping[str, str]) -> PreparedModels:
        """Write what the servers read, choose their ports, and say how to run them under this clock.

        Raises:
            ModelServerError: the workload, or something else that was asked for, does not do.
        """
        ...

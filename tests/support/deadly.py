"""Runs a service in which the handling of some records kills the process: `python -m tests.support.deadly NAME`.

Such a record has `DEADLY` in its value. The process ends as by a fault in a library that is not Python: at once,
without an exception, while the record is parsed.
"""

import dataclasses
import os
import signal
import sys
from typing import Any, Final

import services.router.handler
import shared.kafka.handling
from deploy.local.processes import ProcessSpec
from services import SERVICES

DEADLY: Final = "kills-the-process"

MODULES: Final[dict[str, tuple[Any, str]]] = {"router": (services.router.handler, "parse_request")}
"""Module and name of the function that parses a record, by service; of all others it is `parse_record`."""


def deadly_spec(spec: ProcessSpec) -> ProcessSpec:
    """The process of a service with this fault."""
    return dataclasses.replace(spec, command=(sys.executable, "-m", __name__, spec.command[-1]))


def main() -> None:
    """Run the service that the command line names."""
    service = sys.argv[1]
    module, name = MODULES.get(service, (shared.kafka.handling, "parse_record"))
    parse = getattr(module, name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        if any(DEADLY.encode() in (getattr(one, "value", None) or b"") for one in arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return parse(*arguments, **options)

    setattr(module, name, deadly)
    SERVICES[service].load().main()


if __name__ == "__main__":
    main()

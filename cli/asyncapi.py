"""`sprout asyncapi`: the AsyncAPI document of a service, generated from its code without connecting to anything."""

import importlib
import inspect
import pkgutil
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_settings import BaseSettings

from cli.console import fail, say
from shared.clock import Clock


def asyncapi(
    service: Annotated[str | None, typer.Argument(help="One service, for example router; default: all of them")] = None,
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File for one service, folder for all; default: standard output")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of YAML")] = False,
) -> None:
    """Print the AsyncAPI document of a service: the topics it reads and writes, and their messages."""
    known = service_names()
    chosen = known if service is None else [service.replace("-", "_")]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        fail(f"no service {unknown[0]!r}", remedy=f"there are: {', '.join(known)}")
    documents = {name: document_of(name, as_json=as_json) for name in chosen}
    if out is None:
        print("\n---\n".join(text.rstrip("\n") for text in documents.values()))
        return
    suffix = "json" if as_json else "yaml"
    for name, text in documents.items():
        path = out if service is not None else out / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        say(f"wrote {path}")


def service_names() -> list[str]:
    """Every package below `services`."""
    package = importlib.import_module("services")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)


def document_of(service: str, *, as_json: bool) -> str:
    """The document of one service, under the settings of this environment.

    Raises:
        TypeError: `build_app` wants an argument that is neither settings nor a clock, and has no default.
    """
    build_app = importlib.import_module(f"services.{service}.app").build_app
    app = build_app(**_arguments(build_app))
    specification = app.schema.to_specification()
    text: str = specification.to_json() if as_json else specification.to_yaml()
    return text


def _arguments(build_app: Any) -> dict[str, Any]:  # noqa: ANN401
    """By name: the settings that `build_app` takes, each from the environment or its defaults."""
    hints = typing.get_type_hints(build_app)
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(build_app).parameters.items():
        wanted = hints.get(name)
        if isinstance(wanted, type) and issubclass(wanted, BaseSettings):
            arguments[name] = wanted()
        elif isinstance(wanted, type) and issubclass(wanted, Clock):
            arguments[name] = Clock.from_environment()
        elif parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{build_app.__module__}.build_app: argument {name!r} is neither settings nor a clock")
    return arguments

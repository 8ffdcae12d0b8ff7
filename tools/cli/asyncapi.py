"""`sprout asyncapi`: the AsyncAPI document of a service, generated from its code without connecting to anything."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.fleet import Fleet
from tools.cli.console import fail, say


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
    """The document of one service.

    It depends on the names of the topics alone (`SPROUT_KAFKA_TOPIC_PREFIX`), so that no fleet, no carbon data and no
    database are needed: an example stands for each.
    """
    build_app = importlib.import_module(f"services.{service}.app").build_app
    fleet = _example_fleet()
    example: dict[str, Any] = {"fleet": fleet}
    if service == "carbon_feed":
        example["settings"] = importlib.import_module("services.carbon_feed.settings").CarbonFeedSettings(
            providers={zone: [{"kind": "constant", "intensity_g_per_kwh": 0}] for zone in fleet.zones}
        )
    wanted = inspect.signature(build_app).parameters
    app = build_app(**{name: value for name, value in example.items() if name in wanted})
    specification = app.schema.to_specification()
    text: str = specification.to_json() if as_json else specification.to_yaml()
    return text


def _example_fleet() -> Fleet:
    def pool(name: str, model: str | None) -> dict[str, Any]:
        endpoints = [{"name": f"{name}-0", "grpc": "triton:8001", "metrics": "http://triton:8002/metrics"}]
        return {"name": name, "model": model, "zone": "EXAMPLE", "endpoints": endpoints}

    return Fleet.model_validate(
        {
            "directives": [{"level": "L0"}, {"level": "L1", "text": "Always answer briefly."}],
            "models": [{"name": "example", "chat_template": "chatml"}],
            "pools": [pool("example", "example"), pool("judge", None)],
            "judge": {"pool": "judge"},
        }
    )

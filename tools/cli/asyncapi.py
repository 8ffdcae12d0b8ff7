"""`sprout asyncapi`: the AsyncAPI document of a service, generated from its code without connecting to anything.

FastStream knows which topics a service writes, and its HTTP routes; the broker has noted every read, also those that no
subscriber makes (`shared.kafka.broker.Read`). Messages, keys, headers and replies come from `shared.topics`.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from services import SERVICES, Service
from shared.kafka.broker import Read, ServiceBroker
from shared.kafka.topic_settings import all_topics
from shared.messages import GenerationRequest, Message
from shared.runtime.settings import KafkaSettings
from shared.topics import ANSWERS, HeaderSpec, TopicSpec
from tools.cli.console import fail, needs_extra, say

KAFKA_BINDING_VERSION = "0.5.0"

KEPT_VARIABLES = ("SPROUT_KAFKA_", "SPROUT_ROUTER_LANES", "SPROUT_GATEWAY_BATCH_LANE")
"""Beginnings of the variables that are not replaced by an example: they decide on names and addresses."""

_EXAMPLE_FLEET = """
directives = [{level = "L0"}, {level = "L1", text = "Always answer briefly."}]
models = [{name = "example", chat_template = "chatml"}]
judge = {pool = "judge"}
[[pools]]
name = "example"
model = "example"
zone = "EXAMPLE"
endpoints = [{name = "example-0", grpc = "triton:8001", metrics = "http://triton:8002/metrics"}]
[[pools]]
name = "judge"
zone = "EXAMPLE"
endpoints = [{name = "judge-0", grpc = "triton:8001", metrics = "http://triton:8002/metrics"}]
"""


def asyncapi(
    service: Annotated[str | None, typer.Argument(help="One service, for example router; default: all of them")] = None,
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File for one service, folder for all; default: standard output")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of YAML")] = False,
) -> None:
    """Print the AsyncAPI document of a service: the topics it reads and writes, and their messages."""
    chosen = list(SERVICES) if service is None else [service.replace("-", "_")]
    if chosen[0] not in SERVICES:
        fail(f"no service {chosen[0]!r}", remedy=f"there are: {', '.join(SERVICES)}")
    texts = {}
    for name in chosen:
        with needs_extra(name.replace("_", "-")):
            try:
                document = describe_service(SERVICES[name])
            except (UnknownTopicError, ValidationError) as error:
                fail(str(error))
        texts[name] = json.dumps(document, indent=2, ensure_ascii=False) if as_json else _yaml(document)
    if out is None:
        print("\n---\n".join(texts.values()))
        return
    suffix = "json" if as_json else "yaml"
    for name, text in texts.items():
        path = out if service is not None else out / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        say(f"wrote {path}")


def _yaml(document: Mapping[str, Any]) -> str:
    with needs_extra("dev"):
        import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 - the other extras do not contain it
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")


class UnknownTopicError(ValueError):
    """A service writes to a topic that is not declared."""


def describe_service(service: Service) -> dict[str, Any]:
    """The AsyncAPI 3 document of a service.

    It depends on `KEPT_VARIABLES` only; an example replaces all other configuration.

    Raises:
        UnknownTopicError: the gateway's lane is none of the routers' lanes.
        ValidationError: one of these variables is invalid.
    """
    with _example_environment(service.example_environment):
        kafka, topics = KafkaSettings(), all_topics()
        app = service.load().build_app()
    specification = app.schema.to_specification().to_jsonable()
    assert isinstance(app.broker, ServiceBroker)
    reads, sent = app.broker.reads, _sent(specification, {kafka.topic(spec): spec for spec in topics})
    http_channels, http_operations = _http(specification)
    used = [spec for spec in topics if spec in sent or any(read.spec == spec for read in reads)]
    return {
        "asyncapi": "3.0.0",
        "info": specification["info"],
        "defaultContentType": "application/json",
        "servers": {
            "kafka": specification["servers"]["development"],
            "http": {"host": "localhost:8080", "protocol": "http", "description": "Address: SPROUT_HTTP_*"},
        },
        "channels": {**{spec.name: _channel(spec, kafka) for spec in used}, **http_channels},
        "operations": {
            **_receive(used, reads, sent),
            **_send(used, reads, sent),
            **http_operations,
        },
        "components": {
            "messages": {spec.message.__name__: _message(spec) for spec in used},
            "schemas": _schemas(spec.message for spec in used),
            **{key: value for key, value in specification["components"].items() if key == "securitySchemes"},
        },
    }


@contextmanager
def _example_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Replace Sprout's variables by an example, except for `KEPT_VARIABLES`."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        fleet = Path(folder) / "fleet.toml"
        fleet.write_text(_EXAMPLE_FLEET, encoding="utf-8")
        for name in before:
            if name.startswith(("SPROUT_", "OTEL_")) and not name.startswith(KEPT_VARIABLES):
                del os.environ[name]
        os.environ |= {"SPROUT_FLEET_FILE": str(fleet), **variables}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _sent(specification: Mapping[str, Any], by_address: Mapping[str, TopicSpec]) -> list[TopicSpec]:
    """The topics that a service writes."""
    sent = []
    for operation in specification["operations"].values():
        if operation["action"] == "send":
            channel = specification["channels"][operation["channel"]["$ref"].rpartition("/")[2]]
            if channel["address"] not in by_address:
                raise UnknownTopicError(f"topic {channel['address']!r} is not declared: name it in SPROUT_ROUTER_LANES")
            sent.append(by_address[channel["address"]])
    return sent


def _http(specification: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The channels and operations of the service's HTTP routes, as FastStream describes them."""
    channels, operations = {}, {}
    for name, operation in specification["operations"].items():
        if "http" not in operation.get("bindings", {}):
            continue
        key = name.removesuffix(":HttpChannel")
        channel = specification["channels"][operation["channel"]["$ref"].rpartition("/")[2]]
        channels[f"http-{key}"] = {**channel, "servers": [{"$ref": "#/servers/http"}]}
        operations[f"http-{key}"] = {**operation, "channel": {"$ref": f"#/channels/http-{key}"}}
    return channels, operations


def _channel(spec: TopicSpec, kafka: KafkaSettings) -> dict[str, Any]:
    configuration: dict[str, Any] = {
        "cleanup.policy": spec.cleanup.value.split(","),
        "max.message.bytes": spec.max_message_bytes,
    }
    if spec.retention_ms is not None:
        configuration["retention.ms"] = spec.retention_ms
    return {
        "address": kafka.topic(spec),
        "description": spec.description,
        "servers": [{"$ref": "#/servers/kafka"}],
        "messages": {spec.message.__name__: {"$ref": f"#/components/messages/{spec.message.__name__}"}},
        "bindings": {
            "kafka": {
                "topic": kafka.topic(spec),
                "partitions": spec.partitions,
                "topicConfiguration": configuration,
                "bindingVersion": KAFKA_BINDING_VERSION,
            }
        },
    }


def _receive(used: Sequence[TopicSpec], reads: Sequence[Read], sent: Sequence[TopicSpec]) -> dict[str, Any]:
    operations: dict[str, Any] = {}
    for spec in used:
        found = [read for read in reads if read.spec == spec]
        if not found:
            continue
        operation: dict[str, Any] = {
            "action": "receive",
            "description": " ".join(dict.fromkeys(read.how for read in found)),
        }
        groups = sorted({read.group for read in found if read.group is not None})
        if groups:
            group = {"type": "string", "enum": groups}
            operation["bindings"] = {"kafka": {"groupId": group, "bindingVersion": KAFKA_BINDING_VERSION}}
        operations |= _with_replies(operation, spec, answered_on=sent)
    return operations


def _send(used: Sequence[TopicSpec], reads: Sequence[Read], sent: Sequence[TopicSpec]) -> dict[str, Any]:
    operations: dict[str, Any] = {}
    for spec in used:
        if spec in sent:
            operation = {"action": "send", "description": f"{spec.description}."}
            operations |= _with_replies(operation, spec, answered_on=[read.spec for read in reads])
    return operations


def _with_replies(operation: dict[str, Any], spec: TopicSpec, *, answered_on: Sequence[TopicSpec]) -> dict[str, Any]:
    """An operation by its name; of requests one for each topic of the service that has answers."""
    name, operation = f"{operation['action']}-{spec.name}", operation | _messages_of(spec)
    answers = [(topic, how) for topic, how in ANSWERS if topic in answered_on]
    if spec.message is not GenerationRequest or not answers:
        return {name: operation}
    return {
        name if number == 0 else f"{name}-{topic.name}": operation
        | {"description": f"{operation['description']} {how}", "reply": _messages_of(topic)}
        for number, (topic, how) in enumerate(answers)
    }


def _messages_of(spec: TopicSpec) -> dict[str, Any]:
    channel = f"#/channels/{spec.name}"
    return {"channel": {"$ref": channel}, "messages": [{"$ref": f"{channel}/messages/{spec.message.__name__}"}]}


def _message(spec: TopicSpec) -> dict[str, Any]:
    name = spec.message.__name__
    message: dict[str, Any] = {
        "name": name,
        "title": spec.description,
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{name}"},
        "headers": {
            "type": "object",
            "properties": {header: _header(found) for header, found in spec.headers.items()},
            "required": [header for header, found in spec.headers.items() if found.required],
        },
        "bindings": {
            "kafka": {
                "key": {"type": "string", "description": spec.key},
                "bindingVersion": KAFKA_BINDING_VERSION,
            }
        },
    }
    if spec.correlation is not None:
        message["correlationId"] = {"location": f"$message.payload#/{spec.correlation}"}
    return message


def _header(spec: HeaderSpec) -> dict[str, Any]:
    header = {"type": "string", "description": spec.description}
    return header if spec.pattern is None else header | {"pattern": spec.pattern}


def _schemas(models: Iterable[type[Message]]) -> dict[str, Any]:
    _, document = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = _as_draft_7(document["$defs"])
    return schemas


def _as_draft_7(schema: Any) -> Any:  # noqa: ANN401 - any part of a JSON schema
    """AsyncAPI's schemas are of draft 7, in which `items` describes tuples; pydantic's are of 2020-12."""
    if isinstance(schema, list):
        return [_as_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {"items" if key == "prefixItems" else key: _as_draft_7(value) for key, value in schema.items()}

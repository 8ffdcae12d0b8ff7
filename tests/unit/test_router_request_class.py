"""The class of a record that waits: tenant and model, read without validating it."""

import json
import tomllib

import pytest

from services.router.request_class import RequestClasses
from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.runtime.settings import KafkaSettings
from tests.support.fleets import fleet_toml

DOCUMENT = tomllib.loads(fleet_toml(["h:1"], tenants=("a", "b")))
DOCUMENT["models"].append({"name": "n", "chat_template": "llama-2"})
DOCUMENT["pools"].append({"name": "q", "model": "n", "zone": "GB", "endpoints": [{"name": "f0", "grpc": "h:2"}]})
DOCUMENT["tenants"][1] |= {"model": "n", "max_in_flight": 9}
FLEET = Fleet.model_validate(DOCUMENT)
ONE_CLASS = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))


def classes(fleet: Fleet = FLEET, **settings) -> RequestClasses:
    checked = RouterSettings.model_validate({"max_in_flight": 10, **settings})
    return RequestClasses(fleet=fleet, kafka=KafkaSettings(topic_prefix="s."), settings=checked)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (b'{"prompt": "Why?"}', ("", "m")),
        (b'{"tenant": "a"}', ("a", "m")),
        (b'{"tenant": "b"}', ("b", "n")),
        (b'{"tenant": "b", "model": "m"}', ("b", "m")),
        (b'{"tenant": "stranger", "model": "n"}', ("", "n")),
        (b'{"tenant": "a", "model": "unknown"}', ("a", None)),
        (b'{"tenant": ["a"], "model": {"m": 1}}', ("", None)),
        (b'{"tenant": "b", "model": null}', ("b", "n")),
        (b'{"prompt": "\\"tenant\\": \\"a\\""}', ("", "m")),
        (b"{broken", ("", "m")),
        (b'["tenant"]', ("", "m")),
        (b"[" * 100_000, ("", "m")),
        (b'{"tenant": "\\ud800"}', ("", "m")),
        (b"\xff", ("", "m")),
        (None, ("", "m")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tenant_and_model_are_read_from_anything(value, wanted):
    assert classes().of(value) == wanted


def test_what_is_too_large_is_not_read():
    value = json.dumps({"tenant": "a", "prompt": "x" * 2_000}).encode()
    assert classes().of(value) == ("a", "m")
    assert classes(max_request_bytes=1_024).of(value) == ("", "m")


def test_where_there_is_one_class_nothing_is_read():
    assert classes(ONE_CLASS).of(b'{"tenant": "a", "model": "unknown"}') == ("", "m")


def test_unknown_tenants_share_as_many_parts_as_configured():
    one, some = classes(), classes(unknown_tenant_parts=4)
    names = [f'{{"tenant": "t{number}"}}'.encode() for number in range(200)]
    assert {one.of(name)[0] for name in names} == {""}
    found = {some.of(name)[0] for name in names}
    assert len(found) == 4
    assert found.isdisjoint({"a", "b"})
    assert found | {"a", "b"} == set(some.tenants())
    assert some.of(names[0]) == some.of(names[0])


def test_limits_follow_from_settings_and_fleet_file():
    limits = classes(max_tenant_share=0.55, lanes={"requests": 2, "batch": 1}, max_waiting=9).queue().limits
    assert (limits.places, limits.default_tenant_places, limits.tenant_places) == (10, 5, {"b": 5})
    assert (limits.model_places, limits.lane_records) == (8, 5)
    assert classes(max_in_flight=1, max_tenant_share=0.1).queue().limits.model_places == 1
    assert classes(ONE_CLASS).queue().limits.model_places == 10
    assert classes(lanes={"requests": 2, "batch": 1}).lanes == {"s.requests": "requests", "s.batch": "batch"}

"""Files and settings of the local stack: configuration, fleet file, state file, traces, logs, Java."""

import gzip
import importlib.util
import json
import os
import socket
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from deploy.local.config import CURVES, StackConfig, event_time
from deploy.local.fleet import LocalFleet, LocalServer
from deploy.local.grid import TraceError, default_day, shipped_trace, zone_of
from deploy.local.java import NoJavaError, ensure_java, find_java
from deploy.local.processes import LOOPBACK, free_ports, tail
from deploy.local.services import ServiceEnvironment, secret_file, service_settings
from deploy.local.state import ProcessRecord, StackState, StateError, read_state, remove_state
from deploy.triton.serve import DEFAULT_CURVE, RECORDED
from services.router.settings import RouterSettings
from shared.batch_curve import MEASURED
from shared.fleet import FleetError, Switchback, load_fleet


def fleet(**changes: object) -> LocalFleet:
    config = StackConfig.model_validate(changes)
    servers = tuple(
        LocalServer(grpc=f"127.0.0.1:{8000 + n}", metrics=f"http://127.0.0.1:{9000 + n}/metrics", gpu=f"gpu-{n}")
        for n in range(config.servers)
    )
    return LocalFleet(
        config=config,
        servers=servers,
        judge=replace(servers[0], gpu="gpu-judge"),
        idle_power_w=55.0,
        judge_idle_power_w=0.0,
    )


def state(folder: Path, **changes: object) -> StackState:
    fields = {
        "state_dir": folder,
        "owner_pid": None,
        "started_at_s": 1.0,
        "model": "llama-2-13b-chat",
        "zone": "GB",
        "topic_prefix": "sprout.",
        "bootstrap_servers": "127.0.0.1:9",
        "database_url": "postgresql://sprout@127.0.0.1:1/sprout",
    }
    return StackState.model_validate(fields | changes)


def this_process(name: str = "me") -> ProcessRecord:
    return ProcessRecord(
        name=name, pid=os.getpid(), started_at_s=psutil.Process().create_time(), log=Path("/nowhere/me.log")
    )


class TestConfiguration:
    def test_a_rate_needs_a_replay(self):
        with pytest.raises(ValidationError, match="'rate' is for a replay"):
            StackConfig(rate=720)

    def test_a_missing_workload_is_reported(self, tmp_path):
        with pytest.raises(ValidationError, match=r"there is no file .*nothing.jsonl"):
            StackConfig(workload=tmp_path / "nothing.jsonl")

    def test_a_missing_trace_is_reported_with_its_zone(self, tmp_path):
        with pytest.raises(ValidationError, match=r"no file .*gone.csv; give zone 'GB' a CSV"):
            StackConfig(carbon={"GB": tmp_path / "gone.csv"})

    def test_an_unknown_model_is_rejected_with_the_known_ones(self):
        with pytest.raises(ValidationError, match="'llama-2-13b-chat' or 'smollm2'"):
            StackConfig.model_validate({"model": "gpt-17"})

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"dispatch": "pack"}, "has dispatch = 'pack' but no target: add 'target_batch'"),
            ({"target_batch": 65, "max_in_flight": 64}, "target_batch = 65, more than max_in_flight = 64"),
            ({"servers": 2, "min_awake": 3}, "min_awake = 3 but 2 endpoints"),
            ({"servers": 9}, "less than or equal to 8"),
            ({"servers": 2, "model": "smollm2"}, "'servers' must be 1"),
            ({"curve": "gpt-17"}, "'gpt-17' is unknown; choose one of qwen3-14b-h100, .*recorded"),
            ({"curve": "recorded", "stretch": 10}, "'stretch' is for a curve"),
        ],
    )
    def test_invalid_settings_of_the_model_servers_are_rejected(self, settings, problem):
        with pytest.raises(ValidationError, match=problem):
            StackConfig.model_validate(settings)

    def test_the_default_curve_is_the_stand_ins(self):
        assert StackConfig().curve == DEFAULT_CURVE
        assert set(CURVES) == {*MEASURED, RECORDED}

    def test_a_time_without_a_zone_is_utc(self):
        assert event_time("2023-02-10") == datetime(2023, 2, 10, tzinfo=UTC)
        assert event_time("2023-02-10T01:00+01:00") == datetime(2023, 2, 10, tzinfo=UTC)


class TestFleet:
    def test_the_file_is_a_valid_fleet_with_a_reference_and_a_judge(self, tmp_path):
        fleet().write(tmp_path / "fleet.toml")
        read = load_fleet(tmp_path / "fleet.toml")
        assert read.levels == ("L0", "L3", "L1", "L2")
        assert read.reference_of("llama-2-13b-chat") == "local-13b/L0"
        assert read.zones == ("US-CAL-CISO",)
        pool = read.pool("local-13b")
        assert (pool.triton_model, pool.idle_power_w, pool.endpoints[0].gpus) == ("ensemble", 55.0, ("gpu-0",))
        assert read.chat_template_of(pool) == "llama-2"
        assert read.judge is not None
        judge = read.pool(read.judge.pool)
        assert (judge.model, judge.triton_model, judge.endpoints[0].gpus) == (None, "judge", ("gpu-judge",))

    def test_every_model_has_a_catalogue_that_it_obeys(self, tmp_path):
        texts = {}
        for model in ("llama-2-13b-chat", "smollm2"):
            fleet(model=model).write(tmp_path / "fleet.toml")
            texts[model] = [one.text for one in load_fleet(tmp_path / "fleet.toml").directives]
        concise = "Think step by step in as few words as you can, then give the answer."
        assert texts["llama-2-13b-chat"] == ["", concise, "Always answer briefly.", "Always answer very briefly."]
        assert texts["smollm2"][1:] == ["Always answer briefly.", "Answer in one short sentence, with no explanation."]

    def test_a_smaller_variant_has_a_pool_of_its_own(self, tmp_path):
        config = StackConfig(small=True, servers=2, dispatch="pack", target_batch=8, sleep=True, min_awake=2)
        one, two, small = (LocalServer(grpc=f"h:{n}", metrics=f"http://h:{n}/m", gpu=f"g{n}") for n in (1, 2, 3))
        LocalFleet(
            config=config,
            servers=(one, two),
            small_server=small,
            judge=one,
            idle_power_w=1.0,
            judge_idle_power_w=0.0,
            directives=(("L0", ""), ("L1", "Always answer briefly.")),
        ).write(tmp_path / "fleet.toml")
        read = load_fleet(tmp_path / "fleet.toml")
        pool = read.pool("local-7b")
        assert (pool.model, pool.variant, pool.dispatch, pool.min_awake) == (
            "llama-2-13b-chat", "llama-2-7b-chat", "pack", 1,
        )  # fmt: skip
        assert len(read.options_of("llama-2-13b-chat")) == 4
        assert read.reference_of("llama-2-13b-chat") == "local-13b/L0"
        with pytest.raises(ValidationError, match="smollm2 has no smaller variant"):
            StackConfig(small=True, model="smollm2")

    def test_by_default_servers_are_spread_over_and_nothing_sleeps(self, tmp_path):
        fleet().write(tmp_path / "fleet.toml")
        read = load_fleet(tmp_path / "fleet.toml")
        pool = read.pool("local-13b")
        assert (pool.dispatch, pool.target_batch, pool.sleep, pool.min_awake) == ("spread", None, False, 1)
        assert [endpoint.max_in_flight for endpoint in pool.endpoints] == [None]
        assert read.switchback.share == 0.0

    def test_every_server_is_an_endpoint_in_packing_order_with_a_meter_of_its_own(self, tmp_path):
        fleet(servers=4).write(tmp_path / "fleet.toml")
        read = load_fleet(tmp_path / "fleet.toml")
        endpoints = read.pool("local-13b").endpoints
        assert [endpoint.name for endpoint in endpoints] == [f"local-13b-{n}" for n in range(4)]
        assert [endpoint.grpc for endpoint in endpoints] == [f"127.0.0.1:{8000 + n}" for n in range(4)]
        assert [endpoint.gpus for endpoint in endpoints] == [(f"gpu-{n}",) for n in range(4)]
        (judge,) = read.pool("judge").endpoints
        assert (judge.name, judge.grpc, judge.gpus) == ("judge-0", "127.0.0.1:8000", ("gpu-judge",))

    def test_the_settings_of_the_models_pool(self, tmp_path):
        settings = {
            "dispatch": "pack",
            "target_batch": 32,
            "tpot_objective_ms": 25.5,
            "ttft_objective_ms": 1_000.0,
            "scaling": "elastic",
            "sleep": True,
            "min_awake": 2,
        }
        fleet(servers=3, max_in_flight=64, **settings).write(tmp_path / "fleet.toml")
        read = load_fleet(tmp_path / "fleet.toml")
        pool = read.pool("local-13b")
        assert {name: getattr(pool, name) for name in settings} == settings
        assert [endpoint.max_in_flight for endpoint in pool.endpoints] == [64, 64, 64]
        judge = read.pool("judge")
        assert (judge.dispatch, judge.sleep, judge.endpoints[0].max_in_flight) == ("spread", False, None)

    def test_the_switchback(self, tmp_path):
        switchback = Switchback(share=0.05, block_s=3_600.0, washout_s=60.0, key="a", dispatch="pack", sleep=True)
        fleet(switchback=switchback).write(tmp_path / "fleet.toml")
        assert load_fleet(tmp_path / "fleet.toml").switchback == switchback

    def test_special_characters_are_quoted(self, tmp_path):
        zone = 'A "B" \\ C'
        fleet(zone=zone).write(tmp_path / "fleet.toml")
        assert load_fleet(tmp_path / "fleet.toml").zones == (zone,)

    def test_an_invalid_file_is_rejected(self, tmp_path):
        with pytest.raises(FleetError, match="idle_power_w"):
            replace(fleet(), idle_power_w=-1.0).write(tmp_path / "fleet.toml")


class TestState:
    def test_a_saved_state_is_read_back_and_only_its_owner_may_read_it(self, tmp_path):
        saved = state(tmp_path, processes=(this_process(),))
        saved.save()
        assert read_state(tmp_path) == saved
        assert (tmp_path / "stack.json").stat().st_mode & 0o077 == 0
        assert [process.name for process in saved.running] == ["me"]

    def test_without_a_file_there_is_no_stack(self, tmp_path):
        assert read_state(tmp_path) is None
        remove_state(tmp_path)

    def test_an_invalid_file_is_an_error_with_a_remedy(self, tmp_path):
        (tmp_path / "stack.json").write_text("[]")
        with pytest.raises(StateError, match="remove it if no stack runs"):
            read_state(tmp_path)

    def test_an_unknown_process_is_an_error_with_the_known_ones(self, tmp_path):
        with pytest.raises(StateError, match="no process 'x'; this stack has me"):
            state(tmp_path, processes=(this_process(),)).process("x")


class TestTraces:
    HEADER = "Datetime (UTC),Zone Id,Carbon Intensity gCO₂eq/kWh (direct)\n"

    def hourly(self, hours: int, *, begin: str = "2023-02-10 00:00:00") -> str:
        first = datetime.fromisoformat(begin)
        return self.HEADER + "".join(f"{first + timedelta(hours=hour)},GB,100\n" for hour in range(hours))

    def test_a_replay_begins_at_midnight_a_week_into_the_trace(self, tmp_path):
        trace = tmp_path / "t.csv"
        trace.write_text(self.hourly(240))
        assert default_day(trace) == datetime(2023, 2, 17, tzinfo=UTC)
        trace.write_text(self.hourly(240, begin="2023-02-10 07:00:00"))
        assert default_day(trace) == datetime(2023, 2, 18, tzinfo=UTC)

    def test_a_replay_of_a_short_trace_begins_earlier(self, tmp_path):
        trace = tmp_path / "t.csv"
        trace.write_text(self.hourly(1))
        assert default_day(trace) == datetime(2023, 2, 10, tzinfo=UTC)

    def test_a_compressed_trace(self, tmp_path):
        trace = tmp_path / "t.csv.gz"
        trace.write_bytes(gzip.compress(self.hourly(240).encode()))
        assert default_day(trace) == datetime(2023, 2, 17, tzinfo=UTC)

    def test_the_zone_is_that_of_the_trace(self, tmp_path):
        trace = tmp_path / "t.csv"
        trace.write_text(self.hourly(2))
        assert zone_of(trace) == "GB"
        with pytest.raises(TraceError, match="no zone 'FR'; it has GB"):
            zone_of(trace, wanted="FR")

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("", "is empty"),
            (HEADER, "is empty"),
            ("a,b\n1,2\n", "no column 'Datetime"),
            (HEADER + "soon,GB,1\n", "is not a time: 'soon'"),
        ],
    )
    def test_an_invalid_trace_is_reported_with_the_problem(self, tmp_path, content, problem):
        trace = tmp_path / "broken.csv"
        trace.write_text(content)
        with pytest.raises(TraceError, match=f"broken.csv.*{problem}"):
            default_day(trace)

    def test_a_zone_without_a_shipped_trace_is_an_error_with_a_remedy(self):
        with pytest.raises(TraceError, match=r"no trace is shipped for zone 'ATLANTIS' .*--carbon FILE"):
            shipped_trace("ATLANTIS")


class TestServiceSettings:
    def providers(self, config: StackConfig) -> dict:
        return json.loads(service_settings(config)["carbon_feed"]["SPROUT_CARBON_FEED_PROVIDERS"])

    def test_in_real_time_the_trace_is_repeated(self, tmp_path):
        trace = tmp_path / "gb.csv"
        trace.touch()
        config = StackConfig(state_dir=tmp_path, zone="GB", carbon={"GB": trace})
        assert self.providers(config) == {"GB": [{"kind": "csv", "path": str(trace), "repeat": True}]}

    def test_in_a_replay_the_trace_is_not_repeated(self, tmp_path):
        config = StackConfig(
            state_dir=tmp_path, zone="SAMPLE-SOLAR", event_start=datetime(2024, 2, 8, tzinfo=UTC), rate=60
        )
        assert self.providers(config) == {
            "SAMPLE-SOLAR": [{"kind": "csv", "path": str(shipped_trace("SAMPLE-SOLAR")), "repeat": False}]
        }
        assert service_settings(config)["ledger"]["SPROUT_LEDGER_SETTLE_DELAY_S"] == "600"

    def test_the_key_of_draws_is_made_once_and_only_its_owner_may_read_it(self, tmp_path):
        file = secret_file(tmp_path / "draw-key")
        made = file.read_text()
        assert secret_file(tmp_path / "draw-key").read_text() == made
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert RouterSettings(draw_key_file=file).draw_key_bytes == made.strip().encode()
        environment = ServiceEnvironment(
            bootstrap_servers="", topic_prefix="", database_url="", fleet_file=file, clock={}, draw_key_file=file
        )
        names = {name for name, value in environment.variables().items() if value == str(file)}
        assert {"SPROUT_ROUTER_DRAW_KEY_FILE", "SPROUT_EVALUATOR_DRAW_KEY_FILE"} < names

    def test_settings_of_the_configuration_override_the_defaults(self, tmp_path):
        config = StackConfig(
            state_dir=tmp_path,
            services=("router",),
            settings={"router": {"SPROUT_ROUTER_SAMPLE_SHARE": "0.5", "A": "b"}, "triton": {"C": "d"}},
        )
        settings = service_settings(config)
        assert settings["router"] == {"SPROUT_ROUTER_SAMPLE_SHARE": "0.5", "A": "b"}
        assert settings["triton"] == {"C": "d"}
        assert "carbon_feed" not in settings


def test_the_tail_of_a_log_has_its_last_lines(tmp_path):
    log = tmp_path / "x.log"
    assert tail(log) == "[no log]"
    log.write_text("")
    assert tail(log) == "[empty]"
    log.write_text("".join(f"line {n}\n" for n in range(10_000)))
    assert tail(log, 2) == "line 9998\nline 9999"


def test_free_ports_are_distinct_and_no_other_process_gets_them():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as claim, pytest.raises(OSError, match="in use"):
            claim.bind((LOOPBACK, port))


def test_without_java_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # neither pip nor a Java wheel
    with pytest.raises(NoJavaError, match=r"Kafka needs Java 17 or newer.*Install a Java runtime.*docker compose up"):
        ensure_java(tmp_path, lambda _: None)


def test_a_java_that_is_too_old_is_skipped(tmp_path, monkeypatch):
    home = tmp_path / "old"
    (home / "bin").mkdir(parents=True)
    java = home / "bin" / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(home))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_java(tmp_path)
    assert found is None or found.program != java
    java.write_text("#!/bin/sh\necho 'openjdk version \"21.0.2\" 2024-01-16' >&2\n")
    found = find_java(tmp_path)
    assert found is not None
    assert (found.program, found.major, found.home) == (java, 21, home)

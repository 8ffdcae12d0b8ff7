"""Energy counters in Triton's metrics: differences, resets, missed readings; idle power from spans without calls."""

import pytest

from services.ledger.endpoint import IdlePower, update_idle_power
from services.ledger.meters import Interval, MeteringError, Reading, counters_of, intervals_between, parse_meters

METRICS = """\
# HELP nv_gpu_power_usage GPU power usage in watts
# TYPE nv_gpu_power_usage gauge
nv_gpu_power_usage{gpu_uuid="GPU-1"} 71.5
# TYPE nv_energy_consumption counter
nv_energy_consumption{gpu_uuid="GPU-1"} 1234.5
nv_energy_consumption{gpu_uuid="GPU-2"} 10
nv_inference_count{model="ensemble",version="1"} 7
"""


def test_counters_are_read_by_gpu():
    meters = parse_meters(METRICS)
    assert meters.energy_j == {"GPU-1": 1234.5, "GPU-2": 10.0}
    assert meters.power_w == {"GPU-1": 71.5}
    assert counters_of(("GPU-2",), meters) == {"GPU-2": 10.0}
    assert counters_of((), meters) == meters.energy_j


@pytest.mark.parametrize(
    ("text", "gpus", "message"),
    [
        (METRICS, ("GPU-9",), r"no nv_energy_consumption of GPU GPU-9 \(it reports: GPU-1, GPU-2\); correct 'gpus'"),
        ("", (), "are its GPU metrics enabled"),
        ('nv_energy_consumption{gpu_uuid="a"} NaN\n', (), "must be a number of joules"),
        ('nv_energy_consumption{gpu_uuid="a"} -1\n', (), "must be a number of joules"),
        ('nv_energy_consumption{gpu_uuid="a"} much\n', (), "not in Prometheus' text format"),
        ('{"error": "Energy monitoring is not available"}', (), "no 'total_energy_j' as trtllm-serve's have"),
        ('{"total_energy_j": -1.0}', (), "must be a number of joules"),
        ('{"total_energy_j": 5.0}', ("GPU-1",), r"no nv_energy_consumption of GPU GPU-1 \(it reports: all\)"),
    ],
)
def test_metrics_without_usable_counters_are_rejected_with_a_remedy(text, gpus, message):
    with pytest.raises(MeteringError, match=message):
        counters_of(gpus, parse_meters(text))


def test_a_missed_reading_makes_a_longer_interval():
    readings = [Reading(0, {"a": 5, "b": 1}), Reading(10, {"a": 8, "b": 1}), Reading(40, {"a": 20, "b": 4})]
    assert intervals_between(readings) == [Interval(0, 10, 3), Interval(10, 40, 15)]
    assert intervals_between(readings[:1]) == []


def test_after_a_reset_the_new_value_is_the_energy_since_then():
    assert intervals_between([Reading(0, {"a": 900}), Reading(10, {"a": 40}), Reading(20, {"a": 60})]) == [
        Interval(0, 10, 40, restarted=True),
        Interval(10, 20, 20),
    ]


def test_a_new_gpu_adds_nothing_until_its_second_reading():
    readings = [Reading(0, {"a": 0}), Reading(1, {"a": 1, "b": 500}), Reading(2, {"a": 1}), Reading(3, {"b": 520})]
    assert [one.metered_j for one in intervals_between(readings)] == [1, 0, 20]


def test_idle_power_is_the_least_mean_of_windows_without_calls():
    idle = [(Interval(s, s + 10, j), 0) for s, j in ((0, 0), (10, 1_000), (20, 500))]
    assert update_idle_power(IdlePower(), idle[:2], window_s=30).power_w is None
    assert update_idle_power(IdlePower(), idle, window_s=30) == IdlePower(50.0)
    assert update_idle_power(IdlePower(40.0), idle, window_s=30) == IdlePower(40.0)


def test_calls_and_resets_interrupt_a_span_without_calls():
    spans = [(Interval(0, 20, 1_000), 0), (Interval(20, 30, 9_000), 2), (Interval(30, 50, 1_000), 0)]
    assert update_idle_power(IdlePower(), spans, window_s=30) == IdlePower(None, 20, 1_000)
    assert update_idle_power(IdlePower(), [(Interval(0, 50, 10, restarted=True), 0)], window_s=30) == IdlePower()


def test_trtllm_serve_reports_the_sum_over_its_gpus():
    meters = parse_meters('{"total_energy_j": 1234.5678, "query_time": 981.25}')
    assert counters_of((), meters) == {"all": 1234.5678}
    assert meters.power_w == {}

"""The consumer groups whose lag `sprout status` shows."""

from services import SERVICES
from tools.cli.status import groups_of


def test_the_lag_is_that_of_all_groups_in_which_a_service_processes_records() -> None:
    found = {service: groups_of(service) for service in (*SERVICES, "sleeper", "unknown")}
    assert found["ledger"][:2] == ["ledger.responses", "ledger.usage"]
    assert {service: groups for service, groups in found.items() if service != "ledger"} == {
        "carbon_feed": [],
        "router": ["router"],
        "optimizer": ["optimizer"],
        "evaluator": ["evaluator"],
        "gateway": ["gateway"],
        "sleeper": [],
        "unknown": [],
    }

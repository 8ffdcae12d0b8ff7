"""The scenarios by name: each takes a run, lets traffic flow, and strikes."""

from collections.abc import Awaitable, Callable
from typing import Final

from tests.drills.run import Run
from tests.drills.scenarios.model_servers import triton_errors, triton_hung, triton_killed
from tests.drills.scenarios.producers import malformed
from tests.drills.scenarios.routers import rebalance_storm, sigkill, sigterm
from tests.drills.scenarios.servers import kafka_frozen, kafka_restarted, postgres_absent

Scenario = Callable[[Run], Awaitable[None]]

SCENARIOS: Final[dict[str, Scenario]] = {
    one.__name__: one
    for one in (
        sigkill,
        sigterm,
        rebalance_storm,
        triton_killed,
        triton_hung,
        triton_errors,
        kafka_restarted,
        kafka_frozen,
        postgres_absent,
        malformed,
    )
}

"""Every error that starting or stopping a local stack may raise on purpose; each message tells what to do."""

import asyncpg

from deploy.local.grid import TraceError
from deploy.local.java import NoJavaError
from deploy.local.kafka import KafkaInstallationError
from deploy.local.mock_broker import MockBrokerError
from deploy.local.models import ModelServerError
from deploy.local.postgres import PostgresError
from deploy.local.processes import ProcessFailedError
from deploy.local.state import StateError
from shared.fleet import FleetError
from shared.kafka.admin import ProvisioningError

LOCAL_ERRORS: tuple[type[Exception], ...] = (
    FleetError,
    KafkaInstallationError,
    MockBrokerError,
    ModelServerError,
    NoJavaError,
    PostgresError,
    ProcessFailedError,
    ProvisioningError,
    StateError,
    TraceError,
    asyncpg.PostgresError,
)

"""Compression of what services send: what cannot be compressed stays within the limits of its topic."""

import random

from aiokafka.codec import zstd_encode

from shared.kafka.publish import BATCH_OVERHEAD_BYTES
from shared.runtime.settings import KafkaSettings
from shared.topics import TOPICS

HEADER_BYTES = 61 + 64
"""Of a batch, and of a record without headers."""


def test_services_compress_by_default():
    assert KafkaSettings().compression == "zstd"


def test_a_message_of_the_largest_size_fits_even_if_it_cannot_be_compressed():
    largest = max(spec.max_message_bytes for spec in TOPICS)
    message = random.Random(1).randbytes(largest - BATCH_OVERHEAD_BYTES)
    assert len(zstd_encode(message)) + HEADER_BYTES <= largest

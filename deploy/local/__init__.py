"""The local stack: Kafka, PostgreSQL, Triton and every service as plain processes, without Docker."""

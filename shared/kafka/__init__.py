"""Kafka for every service: broker, subscribers, publishers, dead letters, topics."""

"""The whole system on one machine, without Docker: real Kafka, PostgreSQL and Triton as processes."""

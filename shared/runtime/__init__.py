"""The runtime that all services share: settings, logs, health, clock, database, traces."""

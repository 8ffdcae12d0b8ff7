"""What runs a service: settings, logs, health, clock, database, traces."""

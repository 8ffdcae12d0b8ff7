"""What every service runs with: settings, logs, health, clock, database, traces."""

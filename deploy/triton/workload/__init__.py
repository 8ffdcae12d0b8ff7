"""The workload that is written for this project."""

"""The test harness: builders, processes, and environments for integration tests, fault drills and benchmarks."""

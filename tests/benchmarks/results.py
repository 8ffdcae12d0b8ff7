"""The figures of all benchmarks, in `build/bench.json`."""

import json
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "build" / "bench.json"


def record(name: str, value: float | Mapping[str, float]) -> None:
    """Write a figure into the file, and keep the other figures."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[name] = value
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")

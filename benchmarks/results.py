"""Where benchmarks leave their figures: `build/bench.json`, one object, name to value."""

import json
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "build" / "bench.json"


def record(name: str, value: float) -> None:
    """Keep a figure beside those that are there; one of the same name is replaced."""
    FILE.parent.mkdir(exist_ok=True)
    try:
        figures = json.loads(FILE.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        figures = {}
    figures[name] = value
    partial = FILE.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(FILE)

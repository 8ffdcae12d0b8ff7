"""A small workload for the stand-in models, and the processes that they run in."""

import json
from pathlib import Path

import psutil

LEVELS = {"L0": (100, 2.0), "L1": (30, 0.6), "L2": (10, 0.2)}


def text_of(number: int, level: str) -> str:
    tokens, _ = LEVELS[level]
    return f"Answer {number} at {level}: " + "word " * tokens + "end."


def entry(number: int) -> dict[str, object]:
    return {
        "task": "test",
        "prompt": f"Question number {number}?",
        "preferred": ("L0", "L1", "L2")[number % 3],
        "reference": None,
        "responses": {
            f"m/{level}": {"text": text_of(number, level), "tokens": tokens, "energy_j": tokens * 6.0, "time_s": time_s}
            for level, (tokens, time_s) in LEVELS.items()
        },
    }


def write_entries(path: Path) -> Path:
    """Thirty entries, and a last line that is none."""
    path.write_text("".join(json.dumps(entry(number)) + "\n" for number in range(30)) + "{broken\n")
    return path


def model_processes(server: int) -> list[psutil.Process]:
    """Those of the models, without what looks after them and comes and goes."""
    return [process for process in psutil.Process(server).children() if process.name().startswith("triton_python")]

"""Builders of a fleet file with one model and one pool, and of a workload with its recorded answers."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

MODEL = "m"
ZONE = "GB"
LEVELS = ("L0", "L1", "L2")
DIRECTIVES = {"L1": "Always answer briefly.", "L2": "Always answer very briefly."}

Answers = Mapping[str, tuple[int, float]]
"""Tokens and seconds of a prompt's recorded answers, by level."""


def fleet_toml(
    endpoints: Sequence[str],
    *,
    template: str = "llama-2",
    triton_model: str = "ensemble",
    levels: Sequence[str] = LEVELS,
    pool: str = "",
    switchback: str = "share = 0",
    tenants: Collection[str] = (),
) -> str:
    """A fleet file with one model, one pool `p` with endpoints `e0`, `e1`, ..., and tenants without defaults.

    Args:
        levels: of the directives, "L0" first.
        pool: further lines of the pool.
        switchback: lines of the section.
    """
    lines = ["[switchback]", switchback, "[[directives]]", 'level = "L0"']
    for level in levels[1:]:
        lines += ["[[directives]]", f'level = "{level}"', f'text = "{DIRECTIVES[level]}"']
    lines += ["[[models]]", f'name = "{MODEL}"', f'chat_template = "{template}"']
    lines += [
        "[[pools]]",
        'name = "p"',
        f'model = "{MODEL}"',
        f'zone = "{ZONE}"',
        f'triton_model = "{triton_model}"',
        pool,
    ]
    for number, address in enumerate(endpoints):
        lines += ["[[pools.endpoints]]", f'name = "e{number}"', f'grpc = "{address}"']
    for tenant in tenants:
        lines += ["[[tenants]]", f'name = "{tenant}"']
    return "\n".join(lines) + "\n"


def write_workload(path: Path, answers: Mapping[str, Answers]) -> Path:
    """Write recorded answers of `MODEL` by prompt; every text begins with its level. Returns the path."""
    lines = [
        {
            "task": "test",
            "prompt": prompt,
            "preferred": "L0",
            "responses": {
                f"{MODEL}/{level}": {
                    "text": f"{level} says: " + "word " * tokens,
                    "tokens": tokens,
                    "energy_j": tokens * 6.0,
                    "time_s": time_s,
                }
                for level, (tokens, time_s) in levels.items()
            },
        }
        for prompt, levels in answers.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path

"""Builds the shipped workload from seeded families of prompts; nothing in it was measured.

`python -m deploy.triton.workload.build` writes it; `--check` checks that the file is what this program writes. The
README says what the figures below stand for.
"""

import argparse
import gzip
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from deploy.triton.workload.calculation import MATH, REASONING
from deploy.triton.workload.case import Case, Family
from deploy.triton.workload.knowledge import FACTUAL, READING
from deploy.triton.workload.writing import INSTRUCTION, SUMMARY

TARGET: Final = Path(__file__).parent / "shipped.jsonl.gz"
SEED: Final = 1
PROMPTS_PER_TASK: Final = 200

FAMILIES: Final[Mapping[str, tuple[Family, ...]]] = {
    "factual": FACTUAL,
    "instruction": INSTRUCTION,
    "math": MATH,
    "reading": READING,
    "reasoning": REASONING,
    "summary": SUMMARY,
}
STYLES: Final = {"L0": "full", "L3": "steps", "L1": "brief", "L2": "shortest"}
"""How a model answers at each level, from the longest answers to the shortest."""

TOKENS_PER_WORD: Final = 1.35
SCATTER: Final = 0.08
"""Greatest relative variation of energy and time between answers."""
PREFILL_J: Final = 12.0
PREFILL_S: Final = 0.05
LARGE: Final = "llama-2-13b-chat"
SMALL: Final = "llama-2-7b-chat"
J_AND_S_PER_TOKEN: Final = {LARGE: (5.9, 0.0235), SMALL: (3.2, 0.0125)}


class Levels(NamedTuple):
    """A probability by level."""

    L0: float
    L3: float
    L1: float
    L2: float


PREFERRED: Final = {
    "factual": Levels(0.15, 0.20, 0.35, 0.30),
    "instruction": Levels(0.35, 0.20, 0.30, 0.15),
    "math": Levels(0.35, 0.35, 0.20, 0.10),
    "reading": Levels(0.20, 0.20, 0.30, 0.30),
    "reasoning": Levels(0.30, 0.30, 0.25, 0.15),
    "summary": Levels(0.25, 0.20, 0.35, 0.20),
}
"""Probability that a level's answer is the best of all, if none of them is worse than the full one."""

WRONG: Final = {
    LARGE: {
        "factual": Levels(0.0, 0.0, 0.0, 0.01),
        "math": Levels(0.0, 0.02, 0.12, 0.50),
        "reading": Levels(0.0, 0.01, 0.02, 0.25),
        "reasoning": Levels(0.0, 0.02, 0.06, 0.30),
    },
    SMALL: {
        "factual": Levels(0.04, 0.05, 0.05, 0.06),
        "math": Levels(0.20, 0.25, 0.40, 0.70),
        "reading": Levels(0.06, 0.08, 0.10, 0.35),
        "reasoning": Levels(0.15, 0.20, 0.25, 0.45),
    },
}
"""Probability of a wrong answer, for tasks with right ones."""

DISLIKED: Final = {
    "factual": Levels(0.0, 0.02, 0.02, 0.03),
    "instruction": Levels(0.0, 0.08, 0.12, 0.35),
    "math": Levels(0.0, 0.04, 0.08, 0.12),
    "reading": Levels(0.0, 0.02, 0.03, 0.05),
    "reasoning": Levels(0.0, 0.05, 0.08, 0.15),
    "summary": Levels(0.0, 0.04, 0.06, 0.20),
}
"""Probability that an answer is worse than the large model's full one although it is not wrong."""
SMALL_DISLIKED: Final = 0.10
"""Further probability of this where the small model answers."""


def entries() -> list[dict[str, Any]]:
    """The lines of the workload."""
    return [line for task in sorted(FAMILIES) for line in _task(task)]


def _task(task: str) -> list[dict[str, Any]]:
    """Different prompts of one task, of all its families in turn."""
    chance = random.Random(f"{SEED}/{task}")
    found: dict[str, dict[str, Any]] = {}
    families = list(FAMILIES[task])
    repeats = 0
    while len(found) < PROMPTS_PER_TASK:
        case = families[(len(found) + repeats) % len(families)](chance)
        if case.prompt in found:
            # A family that runs out of prompts leaves the rest to the others.
            repeats += 1
            continue
        found[case.prompt] = _line(task, case, chance)
    return list(found.values())


def _line(task: str, case: Case, chance: random.Random) -> dict[str, Any]:
    line: dict[str, Any] = {"task": task, "prompt": case.prompt}
    responses: dict[str, dict[str, Any]] = {}
    for model in (LARGE, SMALL):
        for level, style in STYLES.items():
            odds = WRONG[model].get(task)
            wrong = odds is not None and chance.random() < getattr(odds, level)
            text = case.text(style, wrong=wrong, chance=chance)
            answer = {"text": text, **_cost(model, text, chance)}
            if case.right is not None:
                answer["correct"] = not wrong
            if (model, level) != (LARGE, "L0"):
                disliked = getattr(DISLIKED[task], level) + (SMALL_DISLIKED if model == SMALL else 0.0)
                drawn = wrong or chance.random() < disliked
                # Equal texts have equal verdicts.
                same = (one.get("worse", False) for one in responses.values() if one["text"] == text)
                answer["worse"] = next(same, drawn)
            responses[f"{model}/{level}"] = answer
    # The best of all answers is neither wrong nor worse than the full one.
    fit = [level for level in STYLES if not responses[f"{LARGE}/{level}"].get("worse", False)]
    line["preferred"] = chance.choices(fit, [getattr(PREFERRED[task], level) for level in fit])[0]
    if case.right is not None:
        line["reference"] = case.right
    return {**line, "responses": responses}


def _cost(model: str, text: str, chance: random.Random) -> dict[str, Any]:
    joules, seconds = J_AND_S_PER_TOKEN[model]
    tokens = max(1, round(TOKENS_PER_WORD * len(text.split())))
    factor = 1.0 + SCATTER * (2.0 * chance.random() - 1.0)
    return {
        "tokens": tokens,
        "energy_j": round(PREFILL_J + joules * tokens * factor, 2),
        "time_s": round(PREFILL_S + seconds * tokens * factor, 4),
    }


def text() -> str:
    """The content of the file."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries())


def main() -> None:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(description=f"Write {TARGET.name}.")
    parser.add_argument("--check", action="store_true", help="only check that the file is up to date")
    if not parser.parse_args().check:
        TARGET.write_bytes(gzip.compress(text().encode(), compresslevel=9, mtime=0))
    elif gzip.decompress(TARGET.read_bytes()).decode() != text():
        sys.stderr.write(f"{TARGET.name} is not what this program writes: run it without --check\n")
        sys.exit(1)


if __name__ == "__main__":
    main()

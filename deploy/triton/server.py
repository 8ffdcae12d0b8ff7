"""The Triton server that the wheel `nvidia-pytriton` carries: its files, its command line, its environment.

The wheel is made for another way of use; only the server and its Python backend are taken from it. The backend runs
models with a program (the stub) that is linked against one minor version of Python. The wheel ships one for each, and
the backend wants the right one beside its library, so the backend's few files are put together in a folder of ours.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
"""Models import the modules of this checkout, or of this image, from here."""

EXIT_TIMEOUT_S = 3
"""How long requests in flight may still take when the server is asked to end."""

STUB = "triton_python_backend_stub"


class ServerError(RuntimeError):
    """The server's files are not there, or cannot run here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TritonPorts:
    """Where a server listens."""

    grpc: int
    http: int
    metrics: int


@dataclass(frozen=True, slots=True)
class Server:
    """A server that can be run.

    Attributes:
        program: the binary.
        backends: folder of its backends.
        python: interpreter whose packages the models may use.
        linker_folders: folders of shared libraries that it needs.
    """

    program: Path
    backends: Path
    python: Path
    linker_folders: tuple[Path, ...]

    def command(self, repository: Path, ports: TritonPorts, *, address: str) -> list[str]:
        """The command line that serves a model repository.

        Args:
            address: what all three services bind; Triton itself would bind every address.
        """
        return [
            str(self.program),
            f"--model-repository={repository}",
            f"--backend-directory={self.backends}",
            f"--grpc-address={address}",
            f"--grpc-port={ports.grpc}",
            f"--http-address={address}",
            f"--http-port={ports.http}",
            f"--metrics-address={address}",
            f"--metrics-port={ports.metrics}",
            # The models' configurations are complete, and the energy metrics are theirs, not the server's.
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            "--allow-cpu-metrics=false",
            # The models here use no GPU memory.
            "--pinned-memory-pool-byte-size=0",
            # A request that no model could answer must not keep the server from ending.
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            # Startup chatter would bury what matters; warnings and errors stay.
            "--log-info=false",
            "--log-verbose=0",
        ]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What to add to the server's environment, `extra` included: libraries, interpreter, our own modules."""
        return {
            "LD_LIBRARY_PATH": _joined(*self.linker_folders, os.environ.get("LD_LIBRARY_PATH")),
            # The backend finds the packages by the first python3 on PATH.
            "PATH": _joined(self.python.parent, os.environ.get("PATH", os.defpath)),
            "PYTHONPATH": str(REPOSITORY_ROOT),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # numpy would start a thread for each core in every model.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **(extra or {}),
        }


def assemble(site_packages: Path, *, python: Path, version: str, folder: Path) -> Server:
    """Put a server together from an environment that has the wheel.

    Args:
        site_packages: of that environment.
        python: its interpreter.
        version: minor version of the interpreter, such as `3.11`.
        folder: where the backend's files are put.

    Raises:
        ServerError: the wheel is missing, has nothing for this Python, or a shared library is missing.
    """
    shipped = site_packages / "pytriton" / "tritonserver"
    program = shipped / "bin" / "tritonserver"
    if not program.is_file():
        raise ServerError(f"{site_packages} has no Triton server: install requirements/triton.lock there")
    stubs = shipped / "python_backend_stubs"
    if not (stubs / version / STUB).is_file():
        known = ", ".join(sorted(path.name for path in stubs.glob("*"))) or "none"
        raise ServerError(
            f"the wheel's Python backend has nothing for Python {version} (it has: {known}); use one of these"
        )
    backend = folder / "python"
    backend.mkdir(parents=True, exist_ok=True)
    for file in (*(shipped / "backends" / "python").iterdir(), stubs / version / STUB):
        if file.is_file():
            shutil.copy2(file, backend)
    libraries = [site_packages / "nvidia_pytriton.libs"]
    missing = _missing_libraries(backend / STUB, libraries)
    if any(name.startswith("libpython") for name in missing):
        libraries.append(_libpython_folder(python, version))
        missing = _missing_libraries(backend / STUB, libraries)
    if missing:
        raise ServerError(
            f"Triton's Python backend needs {', '.join(sorted(missing))}, which this machine lacks; on Debian: "
            f"apt-get install libpython{version} libexpat1 zlib1g"
        )
    return Server(program, folder, python, tuple(libraries))


def assemble_here(folder: Path) -> Server:
    """Put a server together from the environment that this process runs in.

    Raises:
        ServerError: as `assemble` does.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path(sysconfig.get_path("purelib"))
    return assemble(packages, python=Path(sys.executable), version=version, folder=folder)


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def _missing_libraries(program: Path, folders: list[Path]) -> set[str]:
    """Names of the shared libraries that the loader does not find."""
    environment = {**os.environ, "LD_LIBRARY_PATH": _joined(*folders, os.environ.get("LD_LIBRARY_PATH"))}
    try:
        answer = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, timeout=30, check=False, env=environment
        )
    except OSError:
        return set()  # no ldd here: the server itself will say what it lacks
    return {line.split()[0] for line in answer.stdout.splitlines() if line.rstrip().endswith("not found")}


def _libpython_folder(python: Path, version: str) -> Path:
    """Where the interpreter has its shared library; those of uv and of Docker's images have one."""
    question = "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')"
    try:
        answer = subprocess.run(
            [str(python), "-c", question], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerError(f"{python} does not run: {error}") from error
    folder = Path(answer or "/nonexistent")
    if not list(folder.glob(f"libpython{version}.so*")):
        raise ServerError(
            f"Triton's Python backend needs libpython{version}.so, and this machine's Python was built without it; "
            f"install it (Debian: apt-get install libpython{version}), or 'uv python install {version}', whose Python "
            "has it"
        )
    return folder

"""The Triton server in the wheel `nvidia-pytriton`: its files, command line and environment.

Only the server and its Python backend are used of the wheel. The backend runs models with a program (the stub) that is
linked against one minor version of Python. The wheel contains a stub for each version, and the backend expects the
right one beside its library, so the backend's files are copied to a separate folder.
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
"""Models import this project's modules from here."""

EXIT_TIMEOUT_S = 3
"""Seconds that requests in flight may still take when the server stops."""

STUB = "triton_python_backend_stub"


class ServerError(RuntimeError):
    """The server's files are missing or cannot run here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TritonPorts:
    """The ports of a server."""

    grpc: int
    http: int
    metrics: int


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready to run.

    Attributes:
        program: the binary.
        backends: folder of its backends.
        python: interpreter whose packages the models use.
        linker_folders: folders of the shared libraries that it needs.
    """

    program: Path
    backends: Path
    python: Path
    linker_folders: tuple[Path, ...]

    def command(self, repository: Path, ports: TritonPorts, *, address: str, model_control: bool = True) -> list[str]:
        """The command line that serves a model repository; all models are loaded at the start.

        Args:
            address: to which all three services bind; Triton's default is every address.
            model_control: clients may unload and load models. They may then also load models of their own, which run
                any code on the server: allow it only where every client is trusted.
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
            *(("--model-control-mode=explicit", "--load-model=*") if model_control else ()),
            # A server whose model is being unloaded is ready for requests to the others.
            "--strict-readiness=false",
            # The models' configurations are complete, and the models export the energy metrics.
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            "--allow-cpu-metrics=false",
            # The models use no GPU memory.
            "--pinned-memory-pool-byte-size=0",
            # An unanswered request must not keep the server from stopping.
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            # Warnings and errors only; the information at startup is long.
            "--log-info=false",
            "--log-verbose=0",
        ]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Variables to add to the server's environment: libraries, interpreter, this project's modules, and `extra`."""
        return {
            "LD_LIBRARY_PATH": _joined(*self.linker_folders, os.environ.get("LD_LIBRARY_PATH")),
            # The backend takes its packages from the first python3 on PATH.
            "PATH": _joined(self.python.parent, os.environ.get("PATH", os.defpath)),
            "PYTHONPATH": str(REPOSITORY_ROOT),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Otherwise numpy starts a thread for each core in every model.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **(extra or {}),
        }


def assemble(site_packages: Path, *, python: Path, version: str, folder: Path) -> Server:
    """Assemble a server from an environment that has the wheel.

    Args:
        site_packages: of that environment.
        python: its interpreter.
        version: minor version of the interpreter, such as `3.11`.
        folder: to which the backend's files are copied.

    Raises:
        ServerError: the wheel is missing, has no stub for this Python, or a shared library is missing.
    """
    shipped = site_packages / "pytriton" / "tritonserver"
    program = shipped / "bin" / "tritonserver"
    if not program.is_file():
        raise ServerError(f"{site_packages} has no Triton server: install requirements/triton.lock there")
    stubs = shipped / "python_backend_stubs"
    if not (stubs / version / STUB).is_file():
        known = ", ".join(sorted(path.name for path in stubs.glob("*"))) or "none"
        raise ServerError(f"the wheel's Python backend has no stub for Python {version}; use one of: {known}")
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
    """Assemble a server from the environment of this process.

    Raises:
        ServerError: as `assemble` does.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path(sysconfig.get_path("purelib"))
    return assemble(packages, python=Path(sys.executable), version=version, folder=folder)


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def _missing_libraries(program: Path, folders: list[Path]) -> set[str]:
    """Names of the shared libraries that the dynamic linker does not find."""
    environment = {**os.environ, "LD_LIBRARY_PATH": _joined(*folders, os.environ.get("LD_LIBRARY_PATH"))}
    try:
        answer = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, timeout=30, check=False, env=environment
        )
    except OSError:
        return set()  # without ldd, the server itself reports what is missing
    return {line.split()[0] for line in answer.stdout.splitlines() if line.rstrip().endswith("not found")}


def _libpython_folder(python: Path, version: str) -> Path:
    """The folder of the interpreter's shared library; the interpreters of uv and of Docker's images have one."""
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')"
    try:
        answer = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=30, check=True
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

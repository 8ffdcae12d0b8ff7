"""The command line of tritonserver, the same for every way to run it here."""

from pathlib import Path

EXIT_TIMEOUT_S = 5
"""How long requests in flight may still take when the server is asked to end."""


def server_arguments(
    *,
    repository: Path,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    address: str,
    backend_directory: Path | None = None,
) -> list[str]:
    """Arguments after the program's name.

    Args:
        address: what all three services bind; Triton itself would bind every address.
        backend_directory: where the backends lie; null means the server's own.
    """
    return [
        f"--model-repository={repository}",
        f"--grpc-address={address}",
        f"--grpc-port={grpc_port}",
        f"--http-address={address}",
        f"--http-port={http_port}",
        f"--metrics-address={address}",
        f"--metrics-port={metrics_port}",
        *([f"--backend-directory={backend_directory}"] if backend_directory is not None else []),
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

"""How many requests a second the stand-in model serves, and what one costs.

Run `python -m tests.benchmarks.bench_stand_in`.

Starts Triton with a stand-in on a made-up workload (or on the file that WORKLOAD names), in event time 720 times as
fast as ours (a day in two minutes), and asks it through gRPC as the router does, with 1, 8 and 32 requests at once.
It prints requests a second and CPU time per request, of the server, the model and the client, and how much longer than
recorded a request took in wall time.
"""

import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import tritonclient.grpc.aio as grpcclient

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor
from deploy.local.triton import free_triton_ports, install, ready_probe
from deploy.triton.models import stand_in_llm
from deploy.triton.repository import write_repository
from deploy.triton.stand_in.workload import load_workload
from shared.runtime.clock import Clock

RATE = 720.0
REQUESTS = 600
CONCURRENCIES = (1, 8, 32)
MODEL = "llama-2-13b-chat"
DIRECTIVES = ("", "Always answer briefly.", "Always answer very briefly.")


def made_up_workload(path: Path) -> Path:
    """Answers of about the length and pace of Llama-2-13B on an A100."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(200):
            responses = {}
            for level, mean in (("L0", 205), ("L1", 47), ("L2", 31)):
                tokens = mean // 2 + number * mean // 200
                responses[f"{MODEL}/{level}"] = {
                    "tokens": tokens,
                    "energy_j": tokens * 5.9,
                    "time_s": tokens * 0.024,
                    "text": "some words of an answer " * (tokens // 6 + 1),
                }
            line = {"task": "t", "prompt": f"Question {number}?", "preferred": None, "responses": responses}
            file.write(json.dumps(line) + "\n")
    return path


def tensor(name: str, value: object, kind: str, dtype: type) -> grpcclient.InferInput:
    """One input of shape [1, 1]."""
    made = grpcclient.InferInput(name, [1, 1], kind)
    made.set_data_from_numpy(np.array([[value]], dtype=dtype))
    return made


async def ask(client: grpcclient.InferenceServerClient, prompt: str, system: str) -> tuple[int, float]:
    """Responses and wall seconds of one streamed request."""
    text = f"<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{prompt} [/INST]" if system else f"<s>[INST] {prompt} [/INST]"
    inputs = [
        tensor("text_input", text.encode(), "BYTES", np.object_),
        tensor("max_tokens", 1024, "INT32", np.int32),
        tensor("stream", True, "BOOL", np.bool_),
        tensor("return_num_output_tokens", True, "BOOL", np.bool_),
    ]

    async def requests() -> object:
        yield {"model_name": "ensemble", "inputs": inputs, "enable_empty_final_response": True}

    began = time.perf_counter()
    responses = 0
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise error
        responses += 1
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    return responses, time.perf_counter() - began


def cpu_s(pid: int) -> tuple[float, float, float]:
    """CPU seconds of the server, of its models, and of this process."""
    server = psutil.Process(pid)
    models = sum(sum(child.cpu_times()[:2]) for child in server.children())
    return sum(server.cpu_times()[:2]), models, sum(psutil.Process().cpu_times()[:2])


async def measure(grpc: str, pid: int, prompts: Iterator[tuple[str, str, float]], concurrency: int) -> str:
    """One line of the table."""
    done: list[tuple[int, float, float]] = []
    async with grpcclient.InferenceServerClient(grpc) as client:

        async def worker() -> None:
            for prompt, system, time_s in itertools.islice(prompts, REQUESTS // concurrency):
                responses, wall_s = await ask(client, prompt, system)
                done.append((responses, wall_s, time_s / RATE))

        await worker()  # warm
        done.clear()
        before, began = cpu_s(pid), time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        elapsed_s = time.perf_counter() - began
    after = cpu_s(pid)
    server, model, client_ms = (1e3 * (b - a) / len(done) for a, b in zip(before, after, strict=True))
    late_ms = 1e3 * statistics.median(wall_s - due_s for _, wall_s, due_s in done)
    return (
        f"{concurrency:>11} {len(done) / elapsed_s:>10.0f} {sum(one[0] for one in done) / len(done):>9.1f} "
        f"{server:>9.2f} {model:>9.2f} {client_ms:>9.2f} {late_ms:>9.1f}"
    )


def main() -> None:
    """Run the benchmark and print its table."""
    installation = install(default_state_dir(), say=print)
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as scratch:
        folder = Path(scratch)
        given = os.environ.get("WORKLOAD")
        path = Path(given) if given else made_up_workload(folder / "workload.jsonl")
        workload = load_workload(path)
        write_repository(folder / "models", [stand_in_llm(path, model=MODEL)])
        ports = free_triton_ports()
        clock = Clock.starting(datetime(2023, 2, 10, tzinfo=UTC), rate=RATE)
        supervisor = Supervisor(folder / "logs")
        process = supervisor.start(
            ProcessSpec(
                name="triton",
                command=tuple(installation.command(folder / "models", ports)),
                environment=installation.environment(clock.environment()),
                ready=ready_probe(ports),
            )
        )
        levels = ("L0", "L1", "L2")
        prompts = itertools.cycle(
            (entry.prompt, system, entry.responses[MODEL, level].time_s)
            for entry in workload.entries[:2000]
            for level, system in zip(levels, DIRECTIVES, strict=True)
            if (MODEL, level) in entry.responses
        )
        print(f"stand-in of {MODEL} on {path.name}, event time x {RATE:.0f}, {REQUESTS} streamed requests a line")
        print("concurrency requests/s responses   ms of CPU per request of    ms later")
        print("                          per req.    server     model    client  than due")
        try:
            for concurrency in CONCURRENCIES:
                print(asyncio.run(measure(f"127.0.0.1:{ports.grpc}", process.pid, prompts, concurrency)))
        finally:
            supervisor.stop_all()


if __name__ == "__main__":
    main()

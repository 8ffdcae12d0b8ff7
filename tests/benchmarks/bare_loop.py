"""The minimal loop that the router is compared with: Kafka to Triton to Kafka, with aiokafka and tritonclient.

It has no policy, deadline, retry, dead letters or graceful shutdown; offsets are committed by a timer, also before the
answers are sent, so a crash loses requests. `bench_router.py` runs it as a process next to the router:
`python bare_loop.py BOOTSTRAP_SERVERS TOPIC_PREFIX TRITON_ADDRESS`.
"""

import asyncio
import json
import sys

import numpy as np
import tritonclient.grpc.aio as grpcclient
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

IN_FLIGHT = 500


def tensor(name: str, value: object, kind: str, dtype: type) -> grpcclient.InferInput:
    """One input of shape [1, 1]."""
    made = grpcclient.InferInput(name, [1, 1], kind)
    made.set_data_from_numpy(np.array([[value]], dtype=dtype))
    return made


async def generate(client: grpcclient.InferenceServerClient, prompt: str, max_tokens: int) -> tuple[str, int]:
    """Stream an answer; returns its text and number of tokens."""
    inputs = [
        tensor("text_input", f"<s>[INST] {prompt} [/INST]".encode(), "BYTES", np.object_),
        tensor("max_tokens", max_tokens, "INT32", np.int32),
        tensor("stream", True, "BOOL", np.bool_),
        tensor("exclude_input_in_output", True, "BOOL", np.bool_),
        tensor("return_num_output_tokens", True, "BOOL", np.bool_),
    ]

    async def requests() -> object:
        yield {"model_name": "ensemble", "inputs": inputs, "enable_empty_final_response": True}

    pieces, tokens = [], 0
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise error
        pieces.append(result.as_numpy("text_output")[0].decode())
        tokens += int(result.as_numpy("num_output_tokens").item())
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    return "".join(pieces), tokens


async def main(bootstrap_servers: str, prefix: str, triton: str) -> None:
    """Serve until killed."""
    consumer = AIOKafkaConsumer(
        f"{prefix}requests", bootstrap_servers=bootstrap_servers, group_id=f"{prefix}bare", auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, acks="all", enable_idempotence=True, linger_ms=2)
    client = grpcclient.InferenceServerClient(triton)
    free = asyncio.Semaphore(IN_FLIGHT)
    await consumer.start()
    await producer.start()

    async def serve(value: bytes) -> None:
        try:
            request = json.loads(value)
            text, tokens = await generate(client, request["prompt"], request["sampling"]["max_tokens"])
            answer = {"request_id": request["id"], "status": "ok", "text": text, "usage": {"completion_tokens": tokens}}
            await producer.send_and_wait(f"{prefix}responses", json.dumps(answer).encode(), key=request["id"].encode())
        finally:
            free.release()

    async with asyncio.TaskGroup() as tasks:
        async for record in consumer:
            await free.acquire()
            tasks.create_task(serve(record.value))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))

"""`sprout send`: ask as a producer does, and see the answer, the directive, tokens and grams."""

import asyncio
import json
import sys
from typing import Annotated, NoReturn
from uuid import uuid4

import typer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from pydantic import ValidationError
from rich.status import Status

from shared.fleet import Fleet
from shared.kafka.dead_letters import describe
from shared.messages import Footprint, GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock
from shared.topics import REQUESTS
from tools.cli.answer import Answer, Conversation, MissingTopicError, NoAnswerError
from tools.cli.console import Exit, err, fail, out, quiet_clients
from tools.cli.target import Bootstrap, find_target, unreachable


def send(
    prompt: Annotated[str, typer.Argument(help="What to ask; '-' reads it from standard input")],
    *,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated")] = False,
    model: Annotated[str | None, typer.Option(help="Logical model; default: the fleet's first")] = None,
    directive: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="Force a level (L0, L1, ...), or forbid one (!L2)")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Kind of task, for the prompt group")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate")] = 512,
    system: Annotated[str | None, typer.Option(help="A system message of your own")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to wait for the answer")] = 60.0,
    footprint_wait: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for the grams after the answer")
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print response and footprint as JSON")] = False,
    bootstrap: Bootstrap = None,
) -> None:
    """Publish a prompt as a producer would, wait for its answer, print it with directive, tokens and grams.

    Exit codes: 0 answered, 1 the request failed, 2 wrong usage, 3 nothing is running, 4 no answer in time.
    """
    target = find_target(bootstrap)
    if prompt == "-":
        prompt = sys.stdin.read()
    request = _request(
        prompt,
        clock=target.clock,
        model=model,
        directive=directive,
        task=task,
        max_tokens=max_tokens,
        system=system,
        stream=stream,
    )
    quiet_clients()
    printed = stream and not as_json
    metering = err.status("answered; the ledger is reading the meters")
    conversation = Conversation(
        target.kafka,
        request,
        on_chunk=_print_piece if printed else lambda _: None,
        on_response=lambda response: None if as_json else _print_text(response, metering, streamed=printed),
    )
    try:
        answer = asyncio.run(conversation.run(timeout_s=timeout, footprint_wait_s=footprint_wait))
    except MissingTopicError as error:
        fail(str(error), remedy="create them: sprout topics create", code=Exit.NOT_RUNNING)
    except NoAnswerError as error:
        fail(str(error), remedy="is a router running? sprout status, sprout logs router", code=Exit.TIMED_OUT)
    except MessageSizeTooLargeError:
        _too_large(request)
    except (KafkaError, OSError) as error:
        unreachable(target, error)
    finally:
        metering.stop()
    if as_json:
        _print_json(answer)
    else:
        _print_facts(answer, target.fleet())
    if answer.response.status != "ok":
        raise typer.Exit(Exit.FAILED)


def _request(
    prompt: str,
    *,
    clock: Clock,
    model: str | None,
    directive: str | None,
    task: str | None,
    max_tokens: int,
    system: str | None,
    stream: bool,
) -> GenerationRequest:
    content: dict[str, object] = {"prompt": prompt}
    if system is not None:
        content = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}]}
    try:
        return GenerationRequest.model_validate(
            {
                "id": f"cli-{uuid4().hex}",
                "model": model,
                "task": task,
                "directive": directive,
                "sampling": {"max_tokens": max_tokens},
                "stream": stream,
                "requested_at": clock.now(),
                **content,
            }
        )
    except ValidationError as error:
        fail(f"this is no valid request: {describe(error)}")


def _too_large(request: GenerationRequest) -> NoReturn:
    size = len(request.model_dump_json(exclude_none=True))
    fail(
        f"the request has {size} bytes, and topic {REQUESTS.name} takes {REQUESTS.max_message_bytes} at most",
        remedy="shorten the prompt",
    )


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _print_text(response: GenerationResponse, metering: Status, *, streamed: bool) -> None:
    if response.error is not None:
        return
    print("" if streamed else response.text or "", flush=True)
    metering.start()


def _print_facts(answer: Answer, fleet: Fleet | None) -> None:
    response = answer.response
    if response.error is not None:
        err.print(f"error: {response.error.code}: {response.error.message}", markup=False, style="red", soft_wrap=True)
        return
    facts = []
    if response.decision is not None:
        level = response.decision.level
        text = fleet.directive_text(level) if fleet is not None and level in fleet.levels else ""
        how = {"policy": "drawn from the policy", "forced": "as asked", "fallback": "no valid policy"}
        named = f"{level} “{text}”" if text else level
        facts.append(f"directive {named} ({how[response.decision.source]})")
    if response.usage is not None:
        facts.append(f"{response.usage.completion_tokens} tokens")
    facts.append(_grams(answer.footprint))
    out.print("\n" + " · ".join(facts), style="dim", markup=False, soft_wrap=True)


def _grams(footprint: Footprint | None) -> str:
    if footprint is None:
        return "footprint not known yet (the ledger attributes energy once it is SPROUT_LEDGER_SETTLE_DELAY_S old)"
    if footprint.total_g is None:
        return f"{footprint.energy_j:.0f} J, grams unknown: no carbon intensity for {footprint.zone}"
    return f"{footprint.total_g:.4g} gCO2eq ({footprint.energy_j:.0f} J at {footprint.intensity_g_per_kwh:.0f} g/kWh)"


def _print_json(answer: Answer) -> None:
    document = {
        "response": answer.response.model_dump(mode="json"),
        "footprint": None if answer.footprint is None else answer.footprint.model_dump(mode="json"),
    }
    print(json.dumps(document, indent=2, ensure_ascii=False))

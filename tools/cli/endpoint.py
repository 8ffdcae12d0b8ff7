"""`sprout endpoint`: address and key of the local stack's OpenAI-compatible API."""

import json
import shlex
from typing import Annotated

import typer

from tools.cli.console import Exit, fail, print_text, running_stack


def endpoint(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Print the address and an API key of the local stack's OpenAI-compatible API.

    As shell commands that set what OpenAI's clients read: eval "$(sprout endpoint)"

    Exit codes: 0 success, 1 the stack has no gateway, 3 no stack is running.
    """
    state = running_stack()
    try:
        found = state.api
    except OSError as error:
        fail(f"the API key cannot be read ({type(error).__name__})", remedy="start the stack again: sprout up")
    if found is None:
        fail("this stack has no gateway", remedy="it is still starting, or was started without one", code=Exit.FAILED)
    base_url, api_key = found
    if as_json:
        print(json.dumps({"base_url": base_url, "api_key": api_key}))
    else:
        print_text(f"export OPENAI_BASE_URL={shlex.quote(base_url)}\nexport OPENAI_API_KEY={shlex.quote(api_key)}")

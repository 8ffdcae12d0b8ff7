"""The `sprout` command."""

import typer

from tools.cli.report import report
from tools.cli.send import send
from tools.cli.topics import app as topics

LOCAL_PACKAGES = frozenset({"deploy", "services", "shared", "tools"})

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # locals hold prompts
)


@app.callback()
def main() -> None:
    """Carbon-aware LLM serving: run the local stack, send requests, print reports.

    'sprout demo' replays a day in two minutes. 'sprout up' starts a local stack; 'sprout send' sends it a prompt.
    """


# The container image has only the subcommands that work in a container.
try:
    from tools.cli.asyncapi import asyncapi
    from tools.cli.demo import demo
    from tools.cli.policy import app as policy
    from tools.cli.simulate import simulate
    from tools.cli.stack import down, logs, up
    from tools.cli.status import status
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in LOCAL_PACKAGES:
        raise
else:
    for command in (demo, up, down, status, logs, simulate, asyncapi):
        app.command()(command)
    app.add_typer(policy, name="policy")

app.command()(send)
app.command()(report)
app.add_typer(topics, name="topics")

if __name__ == "__main__":
    app()

"""The `sprout` command."""

from contextlib import suppress
from importlib import import_module

import typer

from tools.cli.database import app as database
from tools.cli.dead_letters import app as dead_letters
from tools.cli.erase import erase
from tools.cli.evaluate import evaluate
from tools.cli.keys import app as keys
from tools.cli.report import report
from tools.cli.send import send
from tools.cli.topics import app as topics

LOCAL_COMMANDS = {
    "demo": "demo",
    "up": "stack",
    "down": "stack",
    "status": "status",
    "endpoint": "endpoint",
    "logs": "stack",
    "simulate": "simulate",
    "asyncapi": "asyncapi",
}
"""Subcommands that the container image lacks, and their modules in `tools.cli`."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # locals hold prompts
)


@app.callback()
def main() -> None:
    """Carbon-aware LLM serving: run the local stack, send requests, print reports.

    'sprout demo' replays a day in four minutes. 'sprout up' starts a local stack; 'sprout send' sends it a prompt.
    """


# `send`, `report` and `topics` import every package that all subcommands need; a module that is missing here belongs to
# one local subcommand, which is then left out.
for name, module in LOCAL_COMMANDS.items():
    with suppress(ModuleNotFoundError):
        app.command(name)(getattr(import_module(f"tools.cli.{module}"), name))
with suppress(ModuleNotFoundError):
    from tools.cli.policy import app as policy

    app.add_typer(policy, name="policy")
with suppress(ModuleNotFoundError):
    from tools.cli.directives import app as directives

    app.add_typer(directives, name="directives")

app.command()(send)
app.command()(report)
app.command()(evaluate)
app.command()(erase)
app.add_typer(topics, name="topics")
app.add_typer(database, name="database")
app.add_typer(keys, name="keys")
app.add_typer(dead_letters, name="dead-letters")

if __name__ == "__main__":
    app()

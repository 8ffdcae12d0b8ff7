"""The `sprout` command; every subcommand lives in a module of its own, loaded when it is called for."""

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

SUBCOMMANDS: dict[str, str] = {
    "demo": "tools.cli.demo:demo",
    "up": "tools.cli.stack:up",
    "down": "tools.cli.stack:down",
    "status": "tools.cli.status:status",
    "logs": "tools.cli.logs:logs",
    "send": "tools.cli.send:send",
    "report": "tools.cli.report:report",
    "policy": "tools.cli.policy:app",
    "simulate": "tools.cli.simulate:simulate",
    "topics": "tools.cli.topics:app",
    "asyncapi": "tools.cli.asyncapi:asyncapi",
}
"""Name to `module:attribute`, in the order of the help; the attribute is a function or a Typer application."""


OURS = frozenset({"deploy", "services", "shared", "tools"})
"""Packages of which an image may lack a part."""


class LazyGroup(TyperGroup):
    """Loads a subcommand's module only when the subcommand, or the help, is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002 - typer's context class is its own
        """The subcommands whose modules are there."""
        return [name for name, target in SUBCOMMANDS.items() if _present(target)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401
        """One subcommand; None for an unknown name."""
        target = SUBCOMMANDS.get(cmd_name)
        if target is None or not _present(target):
            return super().get_command(ctx, cmd_name)
        found = _loaded(target)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False)
            alone.command(name=cmd_name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = cmd_name  # an application of its own does not know what it is called here
        return command


def _present(target: str) -> bool:
    """Whether a subcommand can run here; an image holds only those that make sense in a container."""
    try:
        _loaded(target)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            return False
        raise
    return True


def _loaded(target: str) -> Any:  # noqa: ANN401 - a function or a Typer application
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # locals hold prompts
)


@app.callback()
def main() -> None:
    """Carbon-aware LLM serving: the local stack, its topics, a producer, and reports.

    'sprout demo' shows a day in two minutes; 'sprout up' starts a stack to try things on, 'sprout send' asks it.
    """


if __name__ == "__main__":
    app()

"""Renders a conversation and a directive into the prompt text for a model server.

The directive is a system message (paper, section 3.1), appended to the requester's own system message. Level L0 adds
nothing, so a request without a system message is rendered without one, even where a model's published template would
insert a default.

**Control sequences.** A template marks turns with sequences such as `<|im_end|>` or `[/INST]`, which the model server's
tokenizer turns into control tokens wherever they occur. The text of a conversation must not be able to end its own turn
and begin another, so a control sequence in it is either broken by a space after its first character (`< |im_end|>`, the
default, because people ask about markup, and `<s>` is also HTML) or rejected. `ChatTemplate.control_sequences` lists
those that occur.

**Begin-of-sequence.** TensorRT-LLM's preprocessing adds the model's begin-of-sequence token to every prompt, so the
rendered text does not start with it. Between turns it remains where the template has it.

Only Jinja is needed: the package `transformers` renders the same templates, but is far larger than this module's needs.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.messages import ChatMessage

ControlSequencePolicy = Literal["break", "refuse"]

SERVER_TEMPLATE: Final = "server"
"""Name of the template of inference servers that apply their own one."""

SYSTEM_SEPARATOR: Final = "\n\n"
"""Joins system messages, and precedes the user's text where a template has no system role."""


class ChatTemplateError(ValueError):
    """A chat template is missing or unusable; the message names it and the remedy."""


class ConversationError(ValueError):
    """A conversation cannot be rendered with this template; the message says why, without quoting it."""


_PROBE_SYSTEM: Final = "sprout-system-probe"
_PROBE_USER: Final = "sprout-user-probe"


class ChatTemplate:
    """Renders conversations for one model family.

    Attributes:
        name: as in the fleet file.
        stop: sequences that end an answer.
    """

    def __init__(
        self,
        name: str,
        source: str,
        *,
        stop: Sequence[str] = (),
        control: Iterable[str] = (),
        control_pattern: str = "",
        bos_token: str = "",
        eos_token: str = "",
    ) -> None:
        """Compile a template.

        Args:
            source: Jinja, by Hugging Face's conventions: `messages`, `add_generation_prompt`, `bos_token`,
                `eos_token`, `raise_exception`.
            control: sequences that the text of a conversation must not contain.
            control_pattern: regular expression of further ones, of at least two characters and without white space;
                for tokens that are numbered, or that a later model of the family may add.

        Raises:
            ChatTemplateError: it is not valid Jinja, or cannot render a plain conversation.
        """
        self.name = name
        self.stop = tuple(stop)
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._template = _compile(name, source)
        # A space breaks a sequence only if it has at least two characters and no white space.
        breakable = {one for one in control if len(one) > 1 and not any(map(str.isspace, one))}
        sequences = [*([control_pattern] if control_pattern else ()), *map(re.escape, _longest_first(breakable))]
        self._control = re.compile("|".join(sequences)) if sequences else None
        self._has_system_role = self._probe()

    def control_sequences(self, messages: Iterable[ChatMessage]) -> tuple[str, ...]:
        """The control sequences of this template in the text of a conversation, each once."""
        if self._control is None:
            return ()
        found = (match.group() for turn in messages for match in self._control.finditer(turn.content))
        return tuple(dict.fromkeys(found))

    def render(
        self,
        messages: Sequence[ChatMessage],
        directive: str = "",
        *,
        control_sequences: ControlSequencePolicy = "break",
    ) -> str:
        """Render the prompt text, which ends where the model's answer begins.

        Args:
            messages: the conversation; its system messages are joined and placed first.
            directive: the directive's text; empty for L0.
            control_sequences: how to handle a control sequence in the text, see the module's docstring.

        Raises:
            ConversationError: the template rejects the conversation, or a control sequence in it is rejected.
        """
        system: list[str] = []
        turns: list[dict[str, str]] = []
        for index, message in enumerate(messages):
            content = self._guarded(message.content, index, control_sequences)
            if message.role == "system":
                system.append(content)
            else:
                turns.append({"role": message.role, "content": content})
        if directive:
            system.append(directive)
        whole = SYSTEM_SEPARATOR.join(part for part in system if part.strip())
        try:
            return self._render(self._with_system(whole, turns))
        except TemplateError as error:
            raise ConversationError(f"chat template {self.name!r} rejects 'messages': {error}") from error

    def _guarded(self, content: str, index: int, policy: ControlSequencePolicy) -> str:
        found = self._control.search(content) if self._control is not None else None
        if self._control is None or found is None:
            return content
        if policy == "refuse":
            raise ConversationError(
                f"messages[{index}].content contains {found.group()!r}, a control sequence of chat template "
                f"{self.name!r}: remove it or write it differently"
            )
        return _break_all(self._control, content)

    def _with_system(self, system: str, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        if not system:
            return turns
        if self._has_system_role:
            return [{"role": "system", "content": system}, *turns]
        first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
        if first is None:
            raise ConversationError("'messages' has no turn of role 'user': there is nothing to answer")
        folded = {"role": "user", "content": system + SYSTEM_SEPARATOR + turns[first]["content"]}
        return [*turns[:first], folded, *turns[first + 1 :]]

    def _render(self, messages: list[dict[str, str]]) -> str:
        if not messages:
            raise ConversationError("'messages' is empty: there is nothing to answer")
        text = self._template.render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=self._bos_token,
            eos_token=self._eos_token,
            tools=None,
            documents=None,
        )
        return text.removeprefix(self._bos_token)

    def _probe(self) -> bool:
        """Whether the template renders a system message.

        Raises:
            ChatTemplateError: it cannot render a user's turn.
        """
        user = {"role": "user", "content": _PROBE_USER}
        try:
            plain = self._render([user])
        except TemplateError as error:
            raise ChatTemplateError(f"chat template {self.name!r} cannot render a user's turn: {error}") from error
        if _PROBE_USER not in plain:
            raise ChatTemplateError(f"chat template {self.name!r} leaves the user's text out of the prompt")
        try:
            return _PROBE_SYSTEM in self._render([{"role": "system", "content": _PROBE_SYSTEM}, user])
        except TemplateError:
            return False


class ServerTemplate(ChatTemplate):
    """For inference servers that apply their own template: the "prompt" is the conversation as JSON.

    The directive is a system message as elsewhere. The server keeps text and control tokens apart.
    """

    def __init__(self) -> None:
        super().__init__(SERVER_TEMPLATE, "{{ messages | tojson }}")

    def _render(self, messages: list[dict[str, str]]) -> str:
        if not messages:
            raise ConversationError("'messages' is empty: there is nothing to answer")
        return json.dumps(messages)


class _Generation(Extension):
    """The tag `generation`, which marks the model's turns for training and has no effect here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja types it

    def parse(self, parser: Parser) -> list[Node]:
        """Keep only the content between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(name: str, source: str) -> Template:
    """Compile in Jinja's immutable sandbox, because a template is data from the model's publisher.

    The environment has the options, globals and filters for which Hugging Face's templates are written.
    """

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own would escape for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"chat template {name!r}, line {error.lineno}: {error.message}") from error


def _longest_first(sequences: Iterable[str]) -> list[str]:
    return sorted(sequences, key=len, reverse=True)


def _break_all(control: re.Pattern[str], content: str) -> str:
    """Insert a space into every control sequence; repeated, because the result may contain another one."""
    while control.search(content) is not None:
        content = control.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", content)
    return content

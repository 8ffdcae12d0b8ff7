"""Parses a rendered chat prompt: the system message, the user's last turn, and the directive.

A model receives only text, and so does its stand-in. The formats are those of the models' own chat templates: ChatML,
Llama 3, Gemma, and Llama 2 or Mistral (`[INST]`). A format without a system role (Mistral, Gemma) has the system
message at the start of the user's text, so a directive is searched for there too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

REFERENCE_LEVEL = "L0"
"""The level of a prompt without a directive."""

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_LLAMA_3 = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*(.*?)(?:<\|eot_id\|>|\Z)", re.DOTALL)
_GEMMA = re.compile(r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>|\Z)", re.DOTALL)
_LLAMA_2_SYSTEM = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The conversation that the template was given, as far as it can be read from the text."""

    user: str
    system: str = ""


@dataclass(frozen=True, slots=True)
class Directive:
    """A directive level and the text of its system message."""

    level: str
    text: str


def parse_chat(text: str) -> ChatPrompt:
    """Find the system message and the user's last turn; a text in an unknown format is taken as the user's text."""
    for marker, turns in (("<|im_start|>", _CHATML), ("<|start_header_id|>", _LLAMA_3), ("<start_of_turn>", _GEMMA)):
        if marker in text:
            return _from_turns(turns.findall(text))
    if "[INST]" in text:
        return _from_instructions(text)
    return ChatPrompt(user=text.strip())


def detect_level(prompt: ChatPrompt, catalogue: Sequence[Directive]) -> tuple[str, ChatPrompt]:
    """Find the directive; returns its level, and the prompt without a directive at the start of the user's text.

    Longer directives are tried first, because one may begin with another's words. Case and a final full stop do not
    matter.
    """
    system = _folded(prompt.system)
    start = _folded(prompt.user[:2_000])
    for directive in sorted(catalogue, key=lambda one: -len(one.text)):
        wanted = _folded(directive.text).rstrip(".")
        if not wanted:
            continue
        if wanted in system:
            return directive.level, prompt
        if start.startswith(wanted):
            return directive.level, ChatPrompt(user=_without(prompt.user, wanted), system=directive.text)
    return REFERENCE_LEVEL, prompt


def normalised(text: str) -> str:
    """A text for comparison: each run of white space becomes one space."""
    return " ".join(text.split())


def _from_turns(turns: list[tuple[str, str]]) -> ChatPrompt:
    system = "\n\n".join(content.strip() for role, content in turns if role in {"system", "developer"})
    user = next((content.strip() for role, content in reversed(turns) if role == "user"), "")
    return ChatPrompt(user=user, system=system)


def _from_instructions(text: str) -> ChatPrompt:
    found = _LLAMA_2_SYSTEM.search(text)
    last = text[text.rindex("[INST]") + len("[INST]") :]
    end = last.rfind("[/INST]")
    user = _LLAMA_2_SYSTEM.sub("", last if end < 0 else last[:end], count=1)
    return ChatPrompt(user=user.strip(), system=found.group(1) if found else "")


def _folded(text: str) -> str:
    return normalised(text).casefold()


def _without(user: str, wanted: str) -> str:
    """The user's text after a directive whose words are `wanted`; white space inside it may differ."""
    pattern = r"\s+".join(re.escape(word) for word in wanted.split())
    return re.sub(rf"\A\s*{pattern}\.?\s*", "", user, count=1, flags=re.IGNORECASE)

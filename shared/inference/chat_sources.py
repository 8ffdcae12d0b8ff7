"""Loads chat templates: built in, from a Jinja file, or from a model's folder.

Models are published with a file `chat_template.jinja`, or in older releases with a field `chat_template` in
`tokenizer_config.json`, which holds one text, or several by name. The begin-of-sequence and end-of-sequence tokens are
in `tokenizer_config.json`, or in `special_tokens_map.json` beside it.
"""

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from shared.inference.chat import SERVER_TEMPLATE, ChatTemplate, ChatTemplateError, ServerTemplate

LARGEST_TEMPLATE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Family:
    """The sequences and tokens of a built-in template."""

    stop: tuple[str, ...]
    control: tuple[str, ...]
    control_pattern: str = ""
    bos_token: str = ""
    eos_token: str = ""


_NAMED: Final = r"<\|[^|<>\s]{1,64}\|>"
"""A token of the form `<|name|>`: the named ones of a family, its reserved ones, and those of its later models."""

_FAMILIES: Final[dict[str, _Family]] = {
    "llama-2": _Family(
        stop=("</s>",),
        control=("<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        bos_token="<s>",
        eos_token="</s>",
    ),
    "chatml": _Family(
        stop=("<|im_end|>",),
        control=(
            "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>", "<think>",
            "</think>",
        ),
        control_pattern=_NAMED,
        eos_token="<|im_end|>",
    ),
    "llama-3": _Family(
        stop=("<|eot_id|>",),
        control=(),
        control_pattern=_NAMED,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    ),
    "mistral": _Family(
        stop=("</s>",),
        control=(
            "<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
            "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
            "[TOOL_CONTENT]", "[CALL_ID]", "[ARGS]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[AUDIO]", "[BEGIN_AUDIO]",
            "[TRANSCRIBE]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]",
            "[/MODEL_SETTINGS]",
        ),
        control_pattern=r"<SPECIAL_\d{1,4}>",
        bos_token="<s>",
        eos_token="</s>",
    ),
    "gemma": _Family(
        stop=("<end_of_turn>",),
        control=(
            "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
            "<end_of_image>", "<image_soft_token>", "<start_of_audio>", "<end_of_audio>", "<audio_soft_token>",
            "[multimodal]",
        ),
        control_pattern=r"<unused\d{1,4}>",
        bos_token="<bos>",
        eos_token="<eos>",
    ),
}  # fmt: skip

BUILT_IN: Final = tuple(_FAMILIES)
"""Names of the built-in templates."""

_MARKUP: Final = re.compile(
    rf"{_NAMED}|</?s>|\[/?[A-Z][A-Z_]{{2,30}}\]|<</?SYS>>|<(?:start|end)_of_[a-z]{{1,16}}>|<bos>|<eos>"
    r"|</?(?:tool_call|tool_response|tools|think)>|<｜[^｜<>\s]{1,64}｜>"
)
"""Control sequences of common model families, searched for in the source of a template that is not built in."""


class ChatTemplates:
    """Loads each template once."""

    def __init__(self) -> None:
        self._loaded: dict[str, ChatTemplate] = {}

    def load(self, name: str) -> ChatTemplate:
        """Load a built-in template by name, or one from a Jinja file or a model's folder.

        Raises:
            ChatTemplateError: there is no such template, or it is unusable.
        """
        if name not in self._loaded:
            self._loaded[name] = _load(name)
        return self._loaded[name]


def _load(name: str) -> ChatTemplate:
    if name == SERVER_TEMPLATE:
        return ServerTemplate()
    return _built_in(name) if name in _FAMILIES else _from_path(name)


def _built_in(name: str) -> ChatTemplate:
    family = _FAMILIES[name]
    source = resources.files("shared.inference").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(
        name,
        source,
        stop=family.stop,
        control=family.control,
        control_pattern=family.control_pattern,
        bos_token=family.bos_token,
        eos_token=family.eos_token,
    )


def _from_path(name: str) -> ChatTemplate:
    """Load a Jinja file, a `tokenizer_config.json`, or a folder in the form in which models are published."""
    path = Path(name)
    if not path.exists():
        raise ChatTemplateError(
            f"chat template {name!r} is neither built in ({', '.join(BUILT_IN)}) nor an existing file or folder"
        )
    folder = path if path.is_dir() else path.parent
    tokenizer = _document(folder / "special_tokens_map.json") | _document(folder / "tokenizer_config.json")
    if path.suffix == ".json" and path.is_file():
        tokenizer |= _document(path)
        source = _template_of(tokenizer, path, f"{path} has no 'chat_template'")
    elif path.is_file():
        source = _read(path)
    elif (folder / "chat_template.jinja").is_file():
        source = _read(folder / "chat_template.jinja")
    else:
        missing = f"{folder} has neither 'chat_template.jinja' nor a 'chat_template' in 'tokenizer_config.json'"
        source = _template_of(tokenizer, folder / "tokenizer_config.json", missing)
    bos_token, eos_token = _token(tokenizer, "bos_token"), _token(tokenizer, "eos_token")
    control = {*_MARKUP.findall(source), *(token for token in (bos_token, eos_token) if token), *_special(tokenizer)}
    return ChatTemplate(
        name,
        source,
        stop=(eos_token,) if eos_token else (),
        control=control,
        control_pattern=_NAMED if "<|" in source else "",
        bos_token=bos_token,
        eos_token=eos_token,
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_TEMPLATE_BYTES:
            raise ChatTemplateError(f"chat template {path} is larger than {LARGEST_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"chat template {path} cannot be read: {error}") from error


def _document(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ChatTemplateError(f"{path} must hold a JSON object")
    return document


def _template_of(tokenizer: dict[str, Any], path: Path, missing: str) -> str:
    """The `chat_template` of a tokenizer's configuration: one text, or the `default` of several."""
    found = tokenizer.get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            raise ChatTemplateError(
                f"none of the chat templates in {path} is named 'default' (they are: "
                f"{', '.join(map(str, found)) or 'none'}): copy the one that you want to a .jinja file, and name that"
            )
        found = found["default"]
    if not isinstance(found, str):
        raise ChatTemplateError(missing)
    return found


def _token(tokenizer: dict[str, Any], name: str) -> str:
    """The text of a special token, which is published as a string or as an object with `content`."""
    value = tokenizer.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _special(tokenizer: dict[str, Any]) -> set[str]:
    decoder = tokenizer.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return set()
    entries = (entry for entry in decoder.values() if isinstance(entry, dict) and entry.get("special"))
    return {text for entry in entries if isinstance(text := entry.get("content"), str) and text.strip()}

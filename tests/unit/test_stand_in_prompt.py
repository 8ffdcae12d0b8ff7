"""Parsing a rendered chat prompt, and finding the directive in it."""

import pytest

from deploy.triton.stand_in.parameters import DEFAULT_DIRECTIVES
from deploy.triton.stand_in.prompt import ChatPrompt, Directive, detect_level, parse_chat

QUESTION = "Why is the sky blue?\nExplain [briefly]."
BRIEF = "Always answer briefly."

RENDERED = {
    "llama-2": "<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]",
    "chatml": "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] {system}\n\n{user} [/INST]",
    "gemma": "<bos><start_of_turn>user\n{system}\n\n{user}<end_of_turn>\n<start_of_turn>model\n",
}
WITHOUT_SYSTEM = {
    "llama-2": "<s>[INST] {user} [/INST]",
    "chatml": "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>",
    "mistral": "<s>[INST] {user} [/INST]",
    "gemma": "<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n",
    "none": "{user}",
}


@pytest.mark.parametrize("template", RENDERED)
@pytest.mark.parametrize("directive", DEFAULT_DIRECTIVES, ids=lambda directive: directive.level)
def test_the_directive_and_the_question_are_found_in_every_template(template, directive):
    text = RENDERED[template].format(system=directive.text, user=QUESTION)
    level, prompt = detect_level(parse_chat(text), DEFAULT_DIRECTIVES)
    assert level == directive.level
    assert prompt.user == QUESTION


@pytest.mark.parametrize("template", WITHOUT_SYSTEM)
def test_without_a_directive_the_level_is_the_reference(template):
    level, prompt = detect_level(parse_chat(WITHOUT_SYSTEM[template].format(user=QUESTION)), DEFAULT_DIRECTIVES)
    assert (level, prompt.user) == ("L0", QUESTION)


def test_a_directive_in_a_longer_system_message_is_found_in_any_case_and_spacing():
    system = "You are a helpful assistant.\n\nALWAYS answer\n very  briefly"
    level, _ = detect_level(parse_chat(RENDERED["chatml"].format(system=system, user=QUESTION)), DEFAULT_DIRECTIVES)
    assert level == "L2"


def test_a_system_message_without_a_directive_means_the_reference_level():
    text = RENDERED["llama-2"].format(system="Answer like a pirate.", user=QUESTION)
    assert detect_level(parse_chat(text), DEFAULT_DIRECTIVES)[0] == "L0"


def test_a_directive_quoted_by_the_user_has_no_effect():
    text = WITHOUT_SYSTEM["chatml"].format(user=f"What does '{BRIEF}' mean?")
    assert detect_level(parse_chat(text), DEFAULT_DIRECTIVES)[0] == "L0"


def test_of_two_directives_with_the_same_beginning_the_longer_one_is_found():
    catalogue = [Directive("L1", "Be brief"), Directive("L2", "Be brief and plain")]
    assert detect_level(ChatPrompt(user="x", system="Be brief and plain."), catalogue)[0] == "L2"


def test_the_last_turn_of_a_conversation_counts():
    llama = (
        "<s>[INST] <<SYS>>\nAlways answer briefly.\n<</SYS>>\n\nfirst [/INST] an answer </s><s>[INST] second [/INST]"
    )
    chatml = (
        "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\nan answer<|im_end|>\n"
        "<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"
    )
    assert parse_chat(llama) == ChatPrompt(user="second", system="Always answer briefly.")
    assert parse_chat(chatml) == ChatPrompt(user="second")

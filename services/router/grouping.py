"""Which prompt group a request belongs to: prompts that react alike to directives.

Today the producer's task label is the group. Groups that are learned from the prompt's text would be another function
of the request here, chosen by the policy's `group_version`.
"""

from typing import Final

from shared.messages import GenerationRequest

DEFAULT_GROUP: Final = "default"
"""The group of a request whose task is not known."""


def prompt_group(request: GenerationRequest) -> str:
    """The request's prompt group."""
    return request.task or DEFAULT_GROUP

"""Topic `requests`: what a producer asks for."""

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.messages.base import Identifier, Message, UtcDatetime, Value, Wish


class ChatMessage(Value):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks")
    content: str = Field(description="What is said")


class SamplingParameters(Value):
    """How the model samples its answer; what is left out is the server's default."""

    max_tokens: int = Field(default=512, ge=1, le=32_768, description="Most tokens to generate")
    temperature: float | None = Field(default=None, ge=0.0, le=5.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    stop: tuple[str, ...] = Field(default=(), max_length=16, description="Sequences that end the answer")
    seed: int | None = Field(default=None, ge=0)


class GenerationRequest(Message):
    """A prompt to be answered. Give either `prompt` or `messages`."""

    id: Identifier | None = Field(
        default=None, description="Unique id; without one the router derives it from the record's position"
    )
    model: Identifier | None = Field(default=None, description="Logical model; default: the fleet's first")
    prompt: str | None = Field(default=None, min_length=1, description="A single user turn")
    messages: tuple[ChatMessage, ...] | None = Field(
        default=None, min_length=1, description="A conversation; the last turn is the user's"
    )
    task: Identifier | None = Field(default=None, description="Kind of task, when the producer knows it")
    tenant: Identifier | None = Field(default=None, description="On whose behalf; for reports by tenant")
    directive: Wish | None = Field(
        default=None, description="Force this level instead of the policy's draw; with '!' before it: forbid it"
    )
    sampling: SamplingParameters = Field(default_factory=SamplingParameters)
    stream: bool = Field(default=False, description="Publish the answer in chunks as well")
    evaluation_allowed: bool = Field(default=True, description="False keeps the prompt out of the samples")
    requested_at: UtcDatetime | None = Field(
        default=None, description="Event time; default: the record's Kafka timestamp"
    )
    deadline: UtcDatetime | None = Field(default=None, description="After this the answer is of no use")
    metadata: dict[str, str] = Field(default_factory=dict, max_length=32, description="Echoed in the response")

    @model_validator(mode="after")
    def _one_of_prompt_and_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            found = "both" if self.prompt is not None else "neither"
            raise ValueError(f"give either 'prompt' (a text) or 'messages' (a conversation), found {found}")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError(
                f"the last of 'messages' must have role 'user', found {self.messages[-1].role!r}: "
                "there is nothing to answer"
            )
        return self

    def conversation(self) -> tuple[ChatMessage, ...]:
        """The turns to answer, whichever way they were given."""
        if self.messages is not None:
            return self.messages
        return (ChatMessage(role="user", content=self.prompt or ""),)

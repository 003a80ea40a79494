"""Chat completions for a model that knows no roles: a plain template makes one text of the messages."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.serve.logprobs import ChatLogprobs, Logprobs
from mmrec.serve.protocol import ApiError, CompletionRequest, GenerationRequest, RequestModel

DEFAULT_MAX_TOKENS = 256
MOST_TOP_LOGPROBS = 20
"""Of the likeliest tokens in each place; OpenAI's bound."""


class ContentPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One message of a chat. A name is taken and not used."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletion(CompletionRequest):
    """The completion that answers a chat."""

    LOGPROBS: ClassVar[type[Logprobs]] = ChatLogprobs

    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None


class ChatRequest(GenerationRequest):
    """Request of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] = 0

    def completion(self, template: ChatTemplate) -> ChatCompletion:
        """Return the completion that answers the chat; :class:`ApiError` for what cannot be answered."""
        self.check_stops()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        shared = {
            name: getattr(self, name) for name in GenerationRequest.model_fields if name in self.model_fields_set
        }
        end = [template.separator] if template.separator else []
        length = self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS
        prompt = template.render([(message.role, message.text) for message in self.messages])
        if not prompt and self.memory is None:
            raise ApiError(400, "the messages have no text", "messages")
        logprobs = {"logprobs": self.top_logprobs} if self.logprobs else {}
        return ChatCompletion.model_validate(
            {**shared, **logprobs, "prompt": prompt, "max_tokens": length, "stop": [*self.stops, *end]}
        )

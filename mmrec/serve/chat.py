"""Chat completions for a model that knows no roles: a plain template makes one text of the messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmrec.core.errors import UserError
from mmrec.serve.protocol import ApiError, CompletionRequest, GenerationRequest, RequestModel

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class ChatTemplate:
    """How the messages of a chat become one text, and where a reply in it ends.

    Args:
        message: a message as it is written; {role} and {content} are replaced.
        separator: follows every message; where the model writes it, the reply ends. A backslash and n is a line end.
        reply: what the reply begins with, given to the model and not returned, as "assistant: ".
    """

    message: str = "{content}"
    separator: str = "\n\n"
    reply: str = ""

    def __post_init__(self) -> None:
        for name in ("message", "separator", "reply"):
            object.__setattr__(self, name, getattr(self, name).replace("\\n", "\n"))
        if "{content}" not in self.message:
            raise UserError(f"--chat.message is {self.message!r}; it must have {{content}} in it")

    def render(self, messages: list[tuple[str, str]]) -> str:
        """Return the text of ``messages``, pairs of role and content, up to where the reply begins."""
        texts = [self._render_one(role, content) + self.separator for role, content in messages]
        return "".join(texts) + self.reply

    def _render_one(self, role: str, content: str) -> str:
        before, _, after = self.message.partition("{content}")
        return before.replace("{role}", role) + content + after.replace("{role}", role)


PLAIN = ChatTemplate()


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


class ChatRequest(GenerationRequest):
    """Request of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def completion(self, template: ChatTemplate) -> CompletionRequest:
        """Return the completion that answers the chat; :class:`ApiError` for bad stops."""
        self.check_stops()
        shared = {
            name: getattr(self, name) for name in GenerationRequest.model_fields if name in self.model_fields_set
        }
        end = [template.separator] if template.separator else []
        length = self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS
        prompt = template.render([(message.role, message.text) for message in self.messages])
        if not prompt and self.memory is None:
            raise ApiError(400, "the messages have no text", "messages")
        return CompletionRequest.model_validate(
            {**shared, "prompt": prompt, "max_tokens": length, "stop": [*self.stops, *end]}
        )

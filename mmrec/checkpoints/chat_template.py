"""How the messages of a chat become one text: part of what a checkpoint says of its model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mmrec.core.errors import UserError


@dataclass(frozen=True)
class ChatTemplate:
    """How the messages of a chat become one text, and where a reply in it ends.

    Args:
        message: a message as it is written; {role} and {content} are replaced.
        separator: follows every message; where the model writes it, the reply ends.
        reply: what the reply begins with, given to the model and not returned, as "assistant: ".

    Raises:
        UserError: the message has no {content}, or a part is no text.
    """

    message: str = "{content}"
    separator: str = "\n\n"
    reply: str = ""

    def __post_init__(self) -> None:
        for name, part in asdict(self).items():
            if not isinstance(part, str):
                raise UserError(f"--chat.{name} is {part!r}; it must be a text")
        if "{content}" not in self.message:
            raise UserError(f"--chat.message is {self.message!r}; it must have {{content}} in it")

    def render(self, messages: list[tuple[str, str]]) -> str:
        """Return the text of ``messages``, pairs of role and content, up to where the reply begins."""
        texts = [self._render_one(role, content) + self.separator for role, content in messages]
        return "".join(texts) + self.reply

    def _render_one(self, role: str, content: str) -> str:
        before, after = self._around_content()
        return before.replace("{role}", role) + content + after.replace("{role}", role)

    def _around_content(self) -> tuple[str, str]:
        before, _, after = self.message.partition("{content}")
        return before, after

    def jinja(self) -> str:
        """Return the template in the form of transformers' ``chat_template``, which renders the same text."""
        before, after = (
            " ~ message['role'] ~ ".join(_literal(part) for part in around.split("{role}"))
            for around in self._around_content()
        )
        content = (
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
        )
        return (
            f"{{% for message in messages %}}{{{{ {before} }}}}{content}"
            f"{{{{ {after} ~ {_literal(self.separator)} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {_literal(self.reply)} }}}}{{% endif %}}"
        )


def _literal(text: str) -> str:
    """Return ``text`` as a string of Jinja, which reads Python's escapes."""
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"'{escaped}'"


PLAIN = ChatTemplate()
"""The template of a model that has none: the texts, each followed by a blank line."""


@dataclass(frozen=True)
class ChatOptions:
    """Options of a chat template; what is not given stays as it is.

    Args:
        message: a message of a chat as it is written; {role} and {content} are replaced.
        separator: follows every message; where the model writes it, the reply ends. A backslash and n is a line end.
        reply: what the reply begins with, given to the model and not returned, as "assistant: ".
    """

    message: str | None = None
    separator: str | None = None
    reply: str | None = None

    def __post_init__(self) -> None:
        self.change(None)

    def change(self, template: ChatTemplate | None) -> ChatTemplate | None:
        """Return ``template`` with what is given in its place; UserError where that makes none."""
        given: dict[str, Any] = {
            name: part.replace("\\n", "\n") for name, part in asdict(self).items() if part is not None
        }
        return replace(template or PLAIN, **given) if given else template

"""What is asked and answered: OpenAI's completions, with the fields ``memory`` and ``save_memory`` beside its own."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mmrec.core.errors import one_line
from mmrec.serve.limits import Limits

MOST_STOPS, LONGEST_STOP = 4, 64
MOST_LOGPROBS = 5
"""Of the likeliest tokens in each place; OpenAI's bound."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
}
"""Fields of OpenAI's that this server does not have, and what clients send in them that asks for nothing."""


class ApiError(Exception):
    """A request that cannot be served.

    Args:
        status: of HTTP.
        message: one line that says what is wrong.
        param: the field that is wrong, if one is.
        code: for programs, if there is one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message), param, code

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Asked(BaseModel):
    """The fields of a request. Nothing is guessed: an unknown field or a number in a string is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Asked):
    """Of a completion that is streamed."""

    include_usage: bool = False


class CompletionRequest(Asked):
    """Of ``POST /v1/completions``."""

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | list[str] = []
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    memory: str | None = None
    save_memory: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        asks = {key: value for key, value in fields.items() if value is not None and key != "user"}
        return {key: value for key, value in asks.items() if value not in NEUTRAL.get(key, ())}

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _with_one_error(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:  # one a kind of prompt, of which the first would mislead
            layer_types = "must be a text, the numbers of its tokens, or a list of either"
            raise PydanticCustomError("prompt", layer_types) from None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The texts, or their tokens, to go on from: without any, and without a memory, the start of a line."""
        if self.prompt is None:
            return ["\n" if self.memory is None else ""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [part for part in self.prompt if isinstance(part, int)]
        return [tokens] if tokens else [part for part in self.prompt if not isinstance(part, int)]

    @property
    def stops(self) -> list[str]:
        """The strings before which a text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check(self, limits: Limits) -> None:
        """Raise :class:`ApiError` where more is asked for than ``limits`` allow, or what makes no sense."""
        choices = len(self.prompts) * self.n
        for good, param, message in (
            (self.prompts, "prompt", "prompt is an empty list"),
            (all(self.prompts) or self.memory is not None, "prompt", "prompt must not be empty without a memory"),
            (choices <= limits.choices, "n", f"{choices} choices; at most {limits.choices} are given"),
            (
                choices * self.max_tokens <= limits.max_tokens,
                "max_tokens",
                f"{choices * self.max_tokens} tokens to write; at most {limits.max_tokens} are, in all choices",
            ),
            (len(self.stops) <= MOST_STOPS, "stop", f"{len(self.stops)} stops; at most {MOST_STOPS} are looked for"),
            (
                all(0 < len(stop) <= LONGEST_STOP for stop in self.stops),
                "stop",
                f"a stop must have 1 to {LONGEST_STOP} characters",
            ),
            (self.save_memory is None or choices == 1, "save_memory", "save_memory goes with one prompt and n 1"),
        ):
            if not good:
                raise ApiError(400, message, param)


class ScoreRequest(Asked):
    """Of ``POST /v1/score``."""

    text: str
    memory: str | None = None


class ReadRequest(Asked):
    """Of ``POST /v1/memories``: read ``text``, on from ``memory``, and keep what was read as ``name``."""

    name: str
    text: Annotated[str, Field(min_length=1)]
    memory: str | None = None


A = TypeVar("A", bound=Asked)


def parse(body: bytes, kind: type[A]) -> A:
    """Return what ``body``, JSON in UTF-8, asks for; :class:`ApiError` where it is not such."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param) from None

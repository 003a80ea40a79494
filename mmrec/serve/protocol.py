"""Requests and errors of the API: OpenAI's completions, with ``memory`` and ``save_memory`` beside its fields."""

from __future__ import annotations

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from typing import Annotated, Any, ClassVar, Literal, TypeVar

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
from mmrec.serve.logprobs import CompletionLogprobs, Logprobs

MOST_STOPS, LONGEST_STOP = 4, 64
MOST_LOGPROBS = 5
"""Of the likeliest tokens in each place; OpenAI's bound."""


def _without_effect(fields: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values, by field, that OpenAI's clients send and that ask for nothing.

    Most of the fields are not supported otherwise.
    """
    return {
        "best_of": (1, fields.get("n", 1)),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "metadata": ({},),
        "min_p": (0,),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "stop": ("", []),
        "store": (False,),
        "stream_options": ({},),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "functions": ([],),
        "top_k": (0, -1),
    }


HINTS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields that say who asks, or how to cache: they change no answer."""


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are equal as JSON: 0 is not false there."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


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


class RequestModel(BaseModel):
    """Fields of a request. Nothing is guessed: an unknown field or a number in a string is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(RequestModel):
    """Options of a streamed completion. Chunks are never padded, so ``include_obfuscation`` can only be false."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(RequestModel):
    """Fields that completions and chat completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | list[str] = []
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    verbatim: Annotated[int, Field(ge=0)] = 0
    memory: str | None = None
    save_memory: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_fields_that_ask_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = {key: value for key, value in fields.items() if value is not None and key not in HINTS}
        neutral = _without_effect(given)
        return {
            key: value
            for key, value in given.items()
            if not any(_same(value, nothing) for nothing in neutral.get(key, ()))
        }

    @property
    def stops(self) -> list[str]:
        """The strings before which a text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check_stops(self) -> None:
        """Raise :class:`ApiError` for too many or too long stops."""
        if len(self.stops) > MOST_STOPS:
            raise ApiError(400, f"{len(self.stops)} stops; at most {MOST_STOPS} are looked for", "stop")
        if not all(0 < len(stop) <= LONGEST_STOP for stop in self.stops):
            raise ApiError(400, f"a stop must have 1 to {LONGEST_STOP} characters", "stop")


class CompletionRequest(GenerationRequest):
    """Request of ``POST /v1/completions``."""

    LOGPROBS: ClassVar[type[Logprobs]] = CompletionLogprobs
    """The form of its log probabilities."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _with_one_error(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:  # one a kind of prompt, of which the first would mislead
            kinds = "must be a text, the numbers of its tokens, or a list of either"
            raise PydanticCustomError("prompt", kinds) from None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The texts, or their tokens, to go on from: without any, and without a memory, the start of a line."""
        if self.prompt is None:
            return ["\n" if self.memory is None else ""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [part for part in self.prompt if isinstance(part, int)]
        return [tokens] if tokens else [part for part in self.prompt if not isinstance(part, int)]

    def check(self, limits: Limits) -> None:
        """Raise :class:`ApiError` where a limit is exceeded, or fields contradict each other."""
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
            (self.save_memory is None or choices == 1, "save_memory", "save_memory goes with one prompt and n 1"),
        ):
            if not good:
                raise ApiError(400, message, param)


class ScoreRequest(RequestModel):
    """Request of ``POST /v1/score``."""

    text: str
    memory: str | None = None


class ReadRequest(RequestModel):
    """Request of ``POST /v1/memories``: read ``text``, on from ``memory``, and keep what was read as ``name``.

    Where ``learn`` is true, or ``form`` is given, the model learns from it; a memory that learned always does. Its
    n-grams are counted where ``cache`` gives the MiB of a table of them, or the memory has one.
    """

    name: str
    text: Annotated[str, Field(min_length=1)]
    memory: str | None = None
    learn: bool = False
    form: Literal["full", "small"] | None = None
    cache: Annotated[int, Field(ge=1)] | None = None


A = TypeVar("A", bound=RequestModel)


def parse(body: bytes, kind: type[A]) -> A:
    """Return what ``body``, JSON in UTF-8, asks for; :class:`ApiError` where it is not such.

    A byte order mark is left out, as RFC 8259 allows: some shells put one before what they send.
    """
    body = body.removeprefix(BOM_UTF8)
    if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ApiError(400, "the body is UTF-16; it must be JSON in UTF-8")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start:,}; it must be JSON in UTF-8") from None
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param) from None

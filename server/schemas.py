"""What a request may say: strict pydantic models of the OpenAI fields and the usual extensions of other servers.

The invariant: a field is either acted on, or refused by name. Fields of the OpenAI API that are not supported are in
`UNSUPPORTED`, with the values that mean the same as leaving them out (clients send those); any other value, and any
unknown field, is an error. `user`, `metadata` and `safety_identifier` are labels: they go to the log line of the
request and nowhere else.

Reference: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from dibit.engine.config import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams

# Far more than a context holds; to look at each of a million of them takes a second in which no token is sent.
MAX_MESSAGES = 8192
NO_TOOLS = "tool and function calling is not supported; leave it out"
TEXT_ONLY = "only text is supported; leave it out"

# field -> (values that are as good as none, what to say about any other)
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none",), NO_TOOLS),
    "parallel_tool_calls": ((True, False), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none",), NO_TOOLS),
    "response_format": (({"type": "text"},), 'structured output is not supported; supported: {"type": "text"}'),
    "modalities": ((["text"],), 'supported: ["text"]'),
    "audio": ((), TEXT_ONLY),
    "prediction": ((), "predicted outputs are not supported; leave it out"),
    "reasoning_effort": ((), "not supported; a model's own switches are in chat_template_kwargs"),
    "verbosity": ((), "not supported; leave it out"),
    "web_search_options": ((), "web search is not supported; leave it out"),
    "moderation": ((), "moderation is not supported; leave it out"),
    "store": ((False,), "answers are not stored; leave it out"),
    "service_tier": (("auto", "default"), 'there is one tier; supported: "auto", "default"'),
    "prompt_cache_key": ((), "shared prompt prefixes are found by their content; leave it out"),
    "prompt_cache_options": ((), "shared prompt prefixes are kept while there is room; leave it out"),
    "prompt_cache_retention": ((), "shared prompt prefixes are kept while there is room; leave it out"),
    "best_of": ((1,), "supported: 1; for several choices set n"),
    "suffix": (("",), "insertion is not supported; leave it out"),
    # Of other servers.
    "use_beam_search": ((False,), "beam search is not supported; leave it out"),
    "length_penalty": ((1, 1.0), "beam search is not supported; leave it out"),
    "early_stopping": ((False,), "beam search is not supported; leave it out"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text; supported: true"),
    "spaces_between_special_tokens": ((True,), "special tokens are never part of the text; supported: true"),
    "prompt_logprobs": ((), "use echo with logprobs on /v1/completions"),
}
# Members of an assistant message that clients send back from an answer of ours.
UNSUPPORTED_OF_MESSAGE: dict[str, tuple[tuple[Any, ...], str]] = {
    "tool_calls": (([],), NO_TOOLS),
    "tool_call_id": ((), NO_TOOLS),
    "function_call": ((), NO_TOOLS),
    "refusal": ((), "not supported; put the text into content"),
    "annotations": (([],), "not supported; leave it out"),
    "audio": ((), TEXT_ONLY),
}
ROLES = ("system", "developer", "user", "assistant")


def refuse(reason: str, *field: str | int, code: str = "unsupported_value") -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "field": field, "code": code})


def _drop_neutral(data: object, unsupported: Mapping[str, tuple[tuple[Any, ...], str]]) -> object:
    if not isinstance(data, dict):
        return data
    kept = dict(data)
    for field in data.keys() & unsupported.keys():
        neutral, reason = unsupported[field]
        value = kept.pop(field)
        if value is not None and not any(type(value) is type(other) and value == other for other in neutral):
            raise refuse(reason, field, code="unsupported_parameter")
    return kept


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _text_of(content: object) -> object:
    """A message's content as one string; text parts are joined by newlines."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind is None:
            raise refuse('a content part is an object such as {"type": "text", "text": "..."}', i)
        if kind != "text":
            raise refuse(f"content parts of type {str(kind)[:40]!r} are not supported; supported: text", i, "type")
        if not isinstance(part.get("text"), str):
            raise refuse("a text part needs a string", i, "text", code="missing_field")
        if extra := part.keys() - {"type", "text"}:
            raise refuse("unknown field; a text part has type and text", i, min(extra), code="unknown_field")
        texts.append(part["text"])
    return "\n".join(texts)


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(_text_of),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]


class Message(_Strict):
    """A turn. A developer message is a system message; `name` is for the chat template, where it knows names."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("role") in ("tool", "function"):
            raise refuse(f"role {data['role']!r} is not supported; supported: {', '.join(ROLES)}", "role")
        return _drop_neutral(data, UNSUPPORTED_OF_MESSAGE)

    def for_template(self) -> dict[str, str]:
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content, **named}


class StreamOptions(_Strict):
    """include_usage adds a last chunk with the usage; continuous_usage_stats puts the usage so far on every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        return _drop_neutral(data, {"include_obfuscation": ((False,), "not supported; leave it out")})


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
ModelName = Annotated[str, Field(min_length=1, max_length=1024)]
Label = Annotated[str, Field(max_length=512)]


class Sampling(_Strict):
    """Fields common to both kinds of completion."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: object) -> object:
        return _drop_neutral(data, UNSUPPORTED)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise refuse("only allowed when stream is true", "stream_options", code="invalid_value")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    def labels(self) -> dict[str, object]:
        """What the log line repeats of the request."""
        given = {"user": self.user, "safety_identifier": self.safety_identifier, "metadata": self.metadata}
        return {name: value for name, value in given.items() if value}

    _SAME_NAME: ClassVar[tuple[str, ...]] = (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    )  # fmt: skip

    def sampling_params(
        self, choice: int, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Settings of choice number `choice`, which draws with seed + choice. Raises RequestError."""
        given = {name: getattr(self, name) for name in self._SAME_NAME if getattr(self, name) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            seed=None if self.seed is None else self.seed + choice,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class TemplateOptions(_Strict):
    """What becomes of messages in the model's chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: (
        Annotated[dict[Annotated[str, Field(max_length=64)], bool | int | float | str], Field(max_length=16)] | None
    ) = None

    @model_validator(mode="after")
    def _one_way_to_end(self) -> TemplateOptions:
        if self.continue_final_message and self.add_generation_prompt:
            raise refuse(
                "excludes add_generation_prompt; send one of them", "continue_final_message", code="invalid_value"
            )
        return self


class ChatRequest(TemplateOptions, Sampling):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refuse("only allowed when logprobs is true", "top_logprobs", code="invalid_value")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refuse("differs from max_completion_tokens; send one of them", "max_tokens", code="invalid_value")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions. A prompt is text or token ids; a list of either asks for several answers at once."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )
    # 16 is the API's own default.
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.limit == 0 and not self.echo:
            raise refuse("0 is only allowed with echo; ask for at least 1", "max_tokens", code="invalid_value")
        return self

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        # Of one kind throughout, and there may be millions.
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)


class TokenizeRequest(TemplateOptions):
    """POST /tokenize, as in vLLM: a text, or messages."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("send either prompt or messages", "prompt", code="invalid_value")
        if self.messages is not None and self.add_special_tokens is not None:
            raise refuse("messages get theirs from the chat template; leave it out", "add_special_tokens")
        if self.messages is None:
            for field in TemplateOptions.model_fields:
                if getattr(self, field) is not None:
                    raise refuse("is for messages; leave it out", field)
        return self


class DetokenizeRequest(_Strict):
    """POST /detokenize, as in vLLM."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]

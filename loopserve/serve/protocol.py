"""Define the requests of the API: fields, bounds, and what is refused by name. Nothing that changes meaning is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loopserve.core.engine.sampling import SamplingConfig, read_sampling

MAX_MESSAGES = 20_000
MAX_STOP = 16
# What a response can be asked to include. All but the log-probabilities concern tools that run elsewhere, or are there anyway.
_INCLUDED = frozenset(
    {
        "message.output_text.logprobs",
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
Name = Annotated[str, Field(min_length=1, max_length=255)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]

# How the OpenAPI document shows a message; the core reads messages, and says what is wrong with one.
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
                    },
                },
                {"type": "null"},
            ]
        },
        "reasoning_content": {"type": ["string", "null"]},
        "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
    },
}
Messages = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra={"items": _MESSAGE}),
]

# Fields of OpenAI's API that ask for nothing here, or for bookkeeping at OpenAI.
_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_retention",
        "verbosity_hint",
        "client_metadata",
    }
)
# Values that ask for what is done anyway, by field.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
}


class LoopserveOptions(BaseModel):
    """Hold the options of a request that only loopserve has: ``extra_body={"loopserve": {...}}``."""

    model_config = ConfigDict(extra="forbid")

    stack: Name | None = None
    attention_map: Annotated[bool, Field(strict=True)] = False  # which parts of the conversation each step attended to


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """Hold the fields that every request for an answer shares."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=False)

    model: Annotated[str, Field(max_length=512)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    session_id: Name | None = None
    prompt_cache_key: Name | None = None
    loopserve: LoopserveOptions = LoopserveOptions()

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None) -> list[str]:
        found = [value] if isinstance(value, str) else value or []
        if len(found) > MAX_STOP or any(not each or len(each) > 1024 for each in found):
            raise ValueError(f"at most {MAX_STOP} strings of 1 to 1024 characters")
        return found

    @field_validator("loopserve", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("stream", "n", "ignore_eos", mode="before")
    @classmethod
    def _null(cls, value: Any, info: Any) -> Any:
        """Take null for the default, as OpenAI does, and no number for a truth value."""
        if value is None:
            return cls.model_fields[info.field_name].default
        if isinstance(value, bool) != (info.field_name != "n"):
            raise ValueError("true or false is needed" if info.field_name != "n" else "an integer is needed")
        return value

    @model_validator(mode="after")
    def _unknown(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT or value in _DEFAULTS.get(name, ()):
                continue
            raise ValueError(f"{name[:80]!r} is not supported by this server: leave it out")
        return self

    def _sampling(self, **own: Any) -> SamplingConfig:
        """Return the sampling options of the core. ConfigError names what it does not allow."""
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": None if self.logit_bias is None else _token_ids(self.logit_bias),
            "stop": tuple(self.stop or ()),
            "seed": None if self.seed is None else self.seed % (1 << 63),
            "ignore_eos": self.ignore_eos,
            "max_new_tokens": self.max_tokens,
        }
        if self.top_p == 0.0:
            given["temperature"] = 0.0  # the smallest nucleus holds the likeliest token alone
        else:
            given["top_p"] = self.top_p
        return read_sampling({name: value for name, value in (given | own).items() if value is not None})


class ChatRequest(GenerationRequest):
    """Hold a request to ``/v1/chat/completions``. Messages are read by the core, see ``models.messages.as_messages``."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: bool | None = None
    previous_response_id: Name | None = None
    conversation: Name | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Name | None = None

    @property
    def sampling(self) -> SamplingConfig:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(logprobs=self.logprobs, top_logprobs=self.top_logprobs, max_new_tokens=most)


class ResponsesRequest(GenerationRequest):
    """Hold a request to ``/v1/responses``. Items are read by ``response_items``, tools and formats by ``tooling``."""

    input: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] = ""
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # of tools that run at the server: there are none
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Name], Field(max_length=32)] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    service_tier: Name | None = None

    @field_validator("conversation", mode="before")
    @classmethod
    def _conversation(cls, value: Any) -> Any:
        return value["id"] if isinstance(value, dict) and value.keys() == {"id"} else value

    @model_validator(mode="after")
    def _refused(self) -> ResponsesRequest:
        if self.background:
            raise ValueError("background: true is not supported by this server: stream the response, or wait for it")
        if self.truncation not in (None, "disabled"):
            raise ValueError("truncation: only 'disabled' is supported: a conversation that is too long is refused")
        if self.n != 1:
            raise ValueError("n: a response is one answer")
        if self.previous_response_id is not None and self.conversation is not None:
            raise ValueError("give either previous_response_id or conversation")
        for each in self.include or ():
            if each not in _INCLUDED:
                raise ValueError(f"include: {each[:80]!r} is not known")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def sampling(self) -> SamplingConfig:
        most = self.max_output_tokens if self.max_output_tokens is not None else self.max_tokens
        asked = self.wants_logprobs
        return self._sampling(
            logprobs=asked or None, top_logprobs=self.top_logprobs if asked else None, max_new_tokens=most
        )


class CompactRequest(ResponsesRequest):
    """Hold a request to ``/v1/responses/compact``."""


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(BaseModel):
    """Hold what is asked about reasoning. The reasoning itself is given whole, which every summary is part of."""

    model_config = ConfigDict(extra="forbid")

    effort: Name | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class CompletionRequest(GenerationRequest):
    """Hold a request to ``/v1/completions``: one prompt, as text or tokens."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            return value[0]
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            raise ValueError("several prompts in one request are not supported: send one request for each")
        return value

    @property
    def sampling(self) -> SamplingConfig:
        asked = self.logprobs is not None
        return self._sampling(logprobs=asked or None, top_logprobs=self.logprobs if asked else None)


class TokenizeRequest(BaseModel):
    """Hold a request to ``/tokenize``: a prompt, or messages as the chat template writes them."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    return {int(token) if token.isascii() and token.isdigit() else token: value for token, value in bias.items()}  # type: ignore[misc]

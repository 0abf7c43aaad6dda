"""Read speed suites from YAML: ``loopserve/bench/suites/*.yaml`` or a user's file.

Where a field takes a number or a list, a list stands for one case per number; several lists multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loopserve.bench.suite_files import SuiteKind, read_suite
from loopserve.core.stack.config import mistake

Dtype = Literal["float32", "bfloat16", "float16"]
Data = Literal["structured", "model", "planted"]
PrefillOp = Literal[
    "line_scores", "select_lines", "choose_lines", "vertical_slash", "block_sparse", "dense_attention", "sparse_prefill"
]
DecodeOp = Literal["token_scores", "gather_kv", "decode_attention", "sparse_decode"]
ChoosesOn = Literal["own", "structured"]  # a layer's own flat attention, or synthetic heads of its shape
OneOrMore = int | tuple[int, ...]
Case = TypeVar("Case", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KernelPrefill(_Part):
    """Configure operations on the block of a turn's new tokens."""

    tokens: OneOrMore = Field(description="Keys n, the new tokens included.")
    new_tokens: OneOrMore | None = Field(None, description="Queries m, the last of the keys; all of them by default.")
    query_heads: int = Field(8, gt=0)
    kv_heads: int = Field(8, gt=0, description="Ignored under data: model, which has its own grouping.")
    head_dim: OneOrMore = 64
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    data: Data = Field("structured", description="Synthetic heads, the bundled model's, or random with planted lines.")
    density: float | tuple[float, ...] | None = Field(None, description="Density of planted lines.")
    density_of: Literal["cells", "tiles"] = "cells"
    alpha: float = Field(0.95, gt=0, lt=1)
    ops: tuple[PrefillOp, ...] = ("choose_lines", "vertical_slash", "dense_attention", "sparse_prefill")
    dense_heads: int | None = Field(None, gt=0, description="KV heads that dense baselines run on; times are scaled.")
    runs: int | None = Field(None, gt=0, description="Rounds; the suite's own by default.")

    @model_validator(mode="after")
    def _fits(self) -> KernelPrefill:
        if (self.density is not None) != (self.data == "planted"):
            raise mistake("density goes with data: planted, and only with it")
        if self.query_heads % self.kv_heads:
            raise mistake(f"kv_heads {self.kv_heads} must divide query_heads {self.query_heads}")
        if self.new_tokens is not None and max(_several(self.new_tokens)) > min(_several(self.tokens)):
            raise mistake("new_tokens cannot be more than tokens")
        return self


class KernelDecode(_Part):
    """Configure operations of decode steps: attention over the active set, and its selection."""

    tokens: OneOrMore
    query_heads: int = Field(12, gt=0)
    kv_heads: OneOrMore = 12
    head_dim: OneOrMore = 64
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    budget: int = Field(1024, gt=0)
    interval: int = Field(16, gt=0, description="Steps between two selections, and the queries that score.")
    batch: OneOrMore = Field(1, description="Sessions; our operations serve them one after another.")
    ops: tuple[DecodeOp, ...] = ("token_scores", "gather_kv", "decode_attention", "sparse_decode")
    runs: int | None = Field(None, gt=0)


class ModelShape(_Part):
    """Configure a Llama with random weights."""

    layers: int = Field(12, gt=0)
    hidden: int = Field(768, gt=0)
    heads: int = Field(12, gt=0)
    kv_heads: OneOrMore = 12
    intermediate: int = Field(3072, gt=0)
    vocabulary: int = Field(32_000, gt=0)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")


class Decode(ModelShape):
    """Configure time per output token after a history written into the cache."""

    tokens: OneOrMore
    stacks: tuple[str, ...] = ("dense", "loopserve-paper", "loopserve")
    caches: tuple[Literal["preallocated", "growing"], ...] = ("preallocated", "growing")
    new_tokens: int = Field(16, gt=0, description="Tokens of the turn that is answered.")
    output_tokens: int = Field(49, gt=1, description="Outputs of a sparse stack; the first is not a decode step.")
    dense_output_tokens: int = Field(9, gt=1, description="The same for stacks and caches that never select.")
    runs: int | None = Field(None, gt=0)


class Prefill(ModelShape):
    """Configure time to first token of a later turn after a history written into the cache."""

    tokens: OneOrMore = Field(description="History.")
    new_tokens: int = Field(512, gt=0)
    stacks: tuple[str, ...] = ("loopserve",)
    density: float = Field(0.10, gt=0, le=1, description="Cells computed, planted: random weights have no structure.")
    chooses_on: ChoosesOn = Field("own", description="What scoring and selection are paid on.")
    runs: int | None = Field(None, gt=0)


class Short(ModelShape):
    """Configure a short turn end to end: a sparse stack must not be slower than dense."""

    tokens: OneOrMore = (512, 1024, 2048)
    output_tokens: int = Field(32, gt=1)
    stacks: tuple[str, ...] = ("loopserve",)
    runs: int | None = Field(None, gt=0)


class Conversation(ModelShape):
    """Configure many turns with a growing history: TTFT and TPOT of each, dense and sparse."""

    tokens: int = Field(gt=0, description="Length of the whole conversation.")
    turns: int = Field(10, gt=0)
    output_tokens: int = Field(33, gt=1)
    stacks: tuple[str, ...] = ("dense", "loopserve")
    density: float = Field(0.10, gt=0, le=1)
    chooses_on: ChoosesOn = "structured"


class Suite(_Part):
    """Hold a suite file."""

    version: Literal[1]
    name: str
    runs: int = Field(5, gt=0, description="Rounds of paired runs.")
    prefill_kernels: tuple[KernelPrefill, ...] = ()
    decode_kernels: tuple[KernelDecode, ...] = ()
    decode: tuple[Decode, ...] = ()
    prefill: tuple[Prefill, ...] = ()
    short: tuple[Short, ...] = ()
    conversation: tuple[Conversation, ...] = ()


def load_suite(spec: str) -> Suite:
    """Return a suite by name or file. Raises ConfigError, one line per mistake, for an invalid suite."""
    return read_suite(spec, SuiteKind.SPEED).parse(Suite, known_options=lambda at: _options(at))


def _options(at: tuple[str | int, ...]) -> list[str] | None:
    """Return the fields at a place of a suite file, for suggestions."""
    if not at:
        return list(Suite.model_fields)
    parts: dict[str | int, type[BaseModel]] = {
        "prefill_kernels": KernelPrefill,
        "decode_kernels": KernelDecode,
        "decode": Decode,
        "prefill": Prefill,
        "short": Short,
        "conversation": Conversation,
    }
    return list(parts[at[0]].model_fields) if len(at) == 2 and at[0] in parts else None


def cases(part: Case, *axes: str) -> Iterator[Case]:
    """Return one case per combination of the lists in the fields ``axes``; each case holds a single number there."""
    for values in product(*(_several(getattr(part, axis)) for axis in axes)):
        yield part.model_copy(update=dict(zip(axes, values, strict=True)))


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)

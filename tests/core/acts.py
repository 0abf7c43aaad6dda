"""What a faulty policy does: every fault of the matrix, for both interfaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern, DensePattern, LinePattern
from tests.core import faulty
from tests.core.faulty import BUDGET, Act


class Clock:
    """Time that passes only when a policy sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class Attending(LinePattern):
    """Lines whose attend goes wrong."""

    def attend(self, *args: Any, **options: Any) -> Any:
        output, lse = super().attend(*args, **options)
        return type(self).changed(output), lse

    @staticmethod
    def changed(output: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class InDouble(Attending):
    changed = staticmethod(lambda output: output.double())


class InNaN(Attending):
    changed = staticmethod(lambda output: output * float("nan"))


class Foreseeing(LinePattern):
    """Claims cells of later keys."""

    def rows(self, columns: torch.Tensor) -> torch.Tensor:
        return super().rows(columns) | True


def _as(kind: type[LinePattern]) -> Act:
    return lambda _, inputs, pattern, call: kind(pattern.verticals, pattern.slashes, pattern.new_tokens)


def _meta_lines(_: Any, inputs: AttentionInputs, pattern: LinePattern, call: int) -> AttentionPattern:
    object.__setattr__(pattern, "verticals", pattern.verticals.to("meta"))
    return pattern


def _sparse_doing(do: Callable[[Any, AttentionInputs], None], first: int = 1) -> Act:
    def act(policy: Any, inputs: AttentionInputs, pattern: AttentionPattern, call: int) -> AttentionPattern:
        if call >= first:
            do(policy, inputs)
        return pattern

    return act


def _raising(*_: Any) -> None:
    raise ValueError("no\n  luck")


def _exiting(*_: Any) -> None:
    raise SystemExit(3)


def _sleeping(*_: Any) -> None:
    CLOCK.now += 10.0


def _writing(_: Any, inputs: AttentionInputs) -> None:
    inputs.keys[:, : inputs.total_tokens // 2].zero_()


def _writing_positions(_: Any, inputs: AttentionInputs) -> None:
    inputs.positions.add_(1)


def _writing_positions_unseen(_: Any, inputs: AttentionInputs) -> None:
    inputs.positions.data.add_(1)


def _writing_unseen(_: Any, inputs: AttentionInputs) -> None:
    inputs.keys.data[:, :4] = 0.0
    inputs.values.numpy()[:, :4] = 0.0


def _remembering(policy: Any, inputs: AttentionInputs) -> None:
    policy.kept = inputs.keys


def _counting(policy: Any, inputs: AttentionInputs) -> None:
    faulty.SEEN.append(inputs.total_tokens)


def _switching(*_: Any) -> None:
    torch.set_default_dtype(torch.float64 if torch.get_default_dtype() is torch.float32 else torch.float32)


def _drawing(*_: Any) -> None:
    torch.rand(1)


def _noting(_: Any, inputs: AttentionInputs) -> None:
    inputs.state["kept"] = [inputs.values[:, 1:]]


def turncoat(_: Any, inputs: AttentionInputs, pattern: AttentionPattern, call: int) -> AttentionPattern:
    """What a sparsifier that raises at its second call must look like from outside."""
    return pattern if call < 2 else DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)


SPARSIFIER: dict[str, Act] = {
    "raises at its first call": _sparse_doing(_raising),
    "raises at call 2": _sparse_doing(_raising, first=2),
    "exits the program": _sparse_doing(_exiting),
    "wrong type": lambda _, inputs, pattern, call: pattern.to_mask(),
    "wrong shape": lambda _, inputs, pattern, call: DensePattern(pattern.size[0], 1, pattern.size[2]),
    "wrong dtype": _as(InDouble),
    "wrong device": _meta_lines,
    "NaN": _as(InNaN),
    "index out of range": _as(Foreseeing),
    "writes into its inputs": _sparse_doing(_writing),
    "writes into its positions": _sparse_doing(_writing_positions),
    "writes past the counter": _sparse_doing(_writing_unseen),
    "writes into its positions past the counter": _sparse_doing(_writing_positions_unseen),
    "keeps a reference in its state": _sparse_doing(_noting),
    "keeps a reference in itself": _sparse_doing(_remembering),
    "hidden global state": _sparse_doing(_counting),
    "draws from the process's random numbers": _sparse_doing(_drawing),
    "turns a switch of the process": _sparse_doing(_switching),
    "sleeps 10 s": _sparse_doing(_sleeping),
}


def _at(wanted: str, do: Callable[..., Any], first: int = 1) -> Act:
    """Something done, or answered if it is not None, at one moment."""

    def act(moment: str, policy: Any, subject: Any, state: Any, answer: Any, call: int) -> Any:
        if moment != wanted or call < first:
            return answer
        done = do(policy, subject, state, answer)
        return answer if done is None else done

    return act


def _selecting(change: Callable[[KVSelection], Any]) -> Act:
    def answer(_: Any, step: Any, state: Any, selections: Any) -> Any:
        return None if selections is None else {layer: change(each) for layer, each in selections.items()}

    return _at("after_forward", answer)


def _with(**fields: Callable[[KVSelection], Any]) -> Act:
    return _selecting(lambda each: dataclasses.replace(each, **{name: make(each) for name, make in fields.items()}))


def _in_state(_: Any, inputs: AttentionInputs, state: dict[str, Any], answer: Any) -> None:
    state["kept"] = {"deep": (inputs,)}


def _does(do: Callable[[Any, AttentionInputs], None]) -> Callable[..., None]:
    return lambda policy, inputs, *_: do(policy, inputs)


def _wide(each: KVSelection) -> torch.Tensor:
    return torch.arange(each.boundary).expand(len(each.lengths), -1).contiguous()


COMPRESSOR: dict[str, Act] = {
    "raises at its first call": _at("after_attention", _raising),
    "raises at call 2": _at("before_attention", _raising, first=4),
    "exits the program": _at("after_forward", _exiting),
    "wrong type": _selecting(lambda each: each.indices),
    "wrong shape": _with(indices=lambda each: each.indices[:1]),
    "wrong dtype": _with(indices=lambda each: each.indices.int()),
    "wrong device": _with(indices=lambda each: each.indices.to("meta")),
    "index out of range": _with(indices=lambda each: each.indices * 0 + torch.arange(BUDGET) + 10**12),
    "unsorted": _with(indices=lambda each: each.indices.flip(1)),
    "repeated": _with(indices=lambda each: each.indices[:, :1].expand(-1, BUDGET).contiguous()),
    "over budget": _with(indices=_wide, lengths=lambda each: each.lengths * 0 + each.boundary),
    "writes into its inputs": _at("after_attention", _does(_writing)),
    "writes into its positions": _at("after_attention", _does(_writing_positions)),
    "writes past the counter": _at("after_attention", _does(_writing_unseen)),
    "writes into its positions past the counter": _at("after_attention", _does(_writing_positions_unseen)),
    "keeps a reference in its state": _at("after_attention", _in_state),
    "keeps a reference in itself": _at("after_attention", _does(_remembering)),
    "hidden global state": _at("after_attention", _does(_counting)),
    "draws from the process's random numbers": _at("after_attention", _does(_drawing)),
    "turns a switch of the process": _at("after_attention", _does(_switching)),
    "sleeps 10 s": _at("after_attention", _sleeping),
}

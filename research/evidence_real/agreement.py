"""Agreement of a stack with dense attention: teacher-forced tokens, and how the model's next-token distributions differ.

    python -m research.evidence_real.agreement loopserve quest:page=4 loopserve:key_bits=4,page_budget=180

measures stacks side by side. An option without a dot is one of the decode policy, ``prefill.alpha=0.95`` one of the prefill policy.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loopserve.api import load_stack
from loopserve.bench.budget import budget_for, innermost, uncounted_outputs_of, with_budget
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.turn import Turn
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.loading import load
from research.evidence.words import percent, table
from research.evidence_real.replay import ReplayModel, adopt, all_logits, record, replayed
from research.evidence_real.texts import KINDS, TEXTS, continued, digest, text

MODEL = "smollm2"
FORCED = 176
BLOCK = 16  # tokens whose mean is one observation of the standard errors
_PACKED = 9  # sessions per pass
_WHOLE = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}

Found = dict[str, Any]


class Reference:
    """Hold dense attention's distributions after each forced token: log-probabilities ``[n, vocabulary]``."""

    def __init__(self, logits: Tensor, targets: Sequence[int]) -> None:
        """targets: the token that follows each."""
        self.logs = logits.float().log_softmax(-1)
        self.best = self.logs.argmax(-1)
        self.targets = targets

    def compare(self, index: int, logits: Tensor) -> tuple[float, bool, float]:
        """Return KL(dense || other) in nats, whether the likeliest token is the same, and the loss of probability of the token
        that follows, in nats.
        """
        ours, other = self.logs[index], logits.float().log_softmax(-1)
        terms = ours.exp() * (ours - other.clamp(min=-69.0))
        target = self.targets[index]
        kl = max(0.0, float(terms.double().sum()))
        return kl, bool(other.argmax() == self.best[index]), float(ours[target] - other[target])


@dataclass
class Forced:
    """Replace a sampler: give the forced tokens one by one, and compare the logits that each but the first was chosen from."""

    tokens: Sequence[int]
    reference: Reference
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    given: int = 0

    def __call__(self, logits: Tensor) -> int:
        if self.given:
            self.add(self.given - 1, logits)
        self.given += 1
        return self.tokens[self.given - 1]

    def add(self, index: int, logits: Tensor) -> None:
        kl, same, loss = self.reference.compare(index, logits)
        self.kl.append(kl)
        self.same.append(same)
        self.loss.append(loss)

    def found(self) -> Found:
        """Return the sums over blocks of ``BLOCK`` tokens; a last, shorter block counts too."""
        return {
            "tokens": len(self.kl),
            "kl": [round(each, 5) for each in _sums(self.kl)],
            "same": [int(each) for each in _sums(self.same)],
            "loss": [round(each, 4) for each in _sums(self.loss)],
        }


def _sums(values: Sequence[float]) -> list[float]:
    return [sum(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK)]


@lru_cache(maxsize=1)
def loaded(name: str) -> tuple[TransformersModel, Any]:
    """Return model and tokenizer, float32."""
    model, tokenizer = load(name, dtype="float32")
    set_implementation(model, IMPLEMENTATION)
    return TransformersModel(model), tokenizer


@dataclass(frozen=True)
class Text:
    """Name a text: its kind and number, how many tokens of it are the prompt, and how many are forced."""

    kind: str
    number: int
    tokens: int
    forced: int = FORCED


class Case:
    """Hold a prompt, the tokens after it, the recorded dense prefill and what dense attention predicts."""

    def __init__(
        self, model: TransformersModel, prompt: Sequence[int], forced: Sequence[int], content: str = ""
    ) -> None:
        """forced: one token more than predictions are compared."""
        self.model, self.prompt, self.forced = model, list(prompt), list(forced)
        self.digest = digest(content)
        self.recording, logits = record(model, self.prompt, self.forced[:-1])
        self.reference = Reference(logits, self.forced[1:])
        losses = [-float(row[target]) for row, target in zip(self.reference.logs, self.reference.targets, strict=True)]
        self.loss = sum(losses) / len(losses)

    @classmethod
    def of(cls, model: str, source: Text) -> Case:
        """Return the case of a text, for a model by name or directory."""
        network, tokenizer = loaded(model)
        content = text(source.kind, source.number)
        return cls(network, *continued(tokenizer, content, source.tokens, source.forced + 1), content)

    def decoding(self, stacks: Mapping[str, PolicyStack]) -> Iterable[tuple[str, Found]]:
        """Decode the forced tokens under each stack after the dense prefill, several stacks in one pass."""
        names = list(stacks)
        for start in range(0, len(names), _PACKED):
            yield from self._packed({name: stacks[name] for name in names[start : start + _PACKED]}, replays=True)

    def whole(self, stacks: Mapping[str, PolicyStack]) -> Iterable[tuple[str, Found]]:
        """The same with each stack's own prefill."""
        names = list(stacks)
        for start in range(0, len(names), _PACKED):
            yield from self._packed({name: stacks[name] for name in names[start : start + _PACKED]}, replays=False)

    def _packed(self, stacks: Mapping[str, PolicyStack], *, replays: bool) -> Iterable[tuple[str, Found]]:
        model = ReplayModel(self.model, self.recording if replays else None)
        engine = TokenEngine(model, load_stack(_WHOLE), policy_timeout_s=None)
        turns: dict[str, Turn] = {}
        for name, stack in stacks.items():
            forced = Forced(self.forced, self.reference)
            session = engine.session(replayed(stack) if replays else stack)
            turn = engine.begin(session, self.prompt, forced, max_new_tokens=len(self.forced))
            while not turn.output and turn.error is None:
                engine.run_pass([turn])
            turns[name] = turn
        while waiting := [turn for turn in turns.values() if not turn.finished]:
            engine.run_pass(waiting)
        for name, turn in turns.items():
            if turn.error is not None:
                yield name, {"error": f"{type(turn.error).__name__}: {turn.error}"}
            else:
                choose = turn.plan.choose
                assert isinstance(choose, Forced)
                yield (
                    name,
                    choose.found() | {"costs": costs(turn)} | ({} if replays else {"prefill": prefill_costs(turn)}),
                )
            turn.session.close()
        turns.clear()
        gc.collect()

    def prefilling(self, stack: PolicyStack, *, realised: bool = False) -> Found:
        """Prefill under the stack, then read the forced tokens densely: what sparse prefill alone costs.

        realised: measure what share of all rows' mass the pattern holds, as costly as dense attention.
        """
        engine = TokenEngine(self.model, load_stack(_WHOLE), measure_coverage=realised, policy_timeout_s=None)
        session = engine.session(stack)
        started = time.process_time()
        engine.prefill(session, self.prompt)
        seconds = time.process_time() - started
        found = prefill_figures(session.stats) | {"seconds": round(seconds, 3)}
        reading = engine.session()
        adopt(reading, session)
        with all_logits(self.model) as logits:
            engine.prefill(reading, self.forced[:-1])
        forced = Forced(self.forced, self.reference)
        for index, row in enumerate(torch.cat(logits)):
            forced.add(index, row)
        reading.close()
        gc.collect()
        return forced.found() | {"prefill": found}


def prefill_costs(turn: Turn) -> Found:
    return prefill_figures(turn.session.stats)


def prefill_figures(stats: Any) -> Found:
    means = stats.as_dict()
    return {
        "cells": means["prefill_cell_density"],
        "tiles": means["prefill_tile_density"],
        "coverage": means["coverage_estimated"],
        "realised": means["coverage_realised"],
        "ms": round(stats.ttft_ms, 1),
        "cells_by_layer": [
            round(sum(heads["prefill_cell_density"]) / len(heads["prefill_cell_density"]), 4)
            for _, heads in sorted(stats.head_figures().items())
            if "prefill_cell_density" in heads
        ],
    }


def costs(turn: Turn) -> Found:
    """Sums over the decode steps, of which shares are made. Bytes are of a float32 store; ``halved`` are those of a bfloat16 one."""
    stats = turn.session.stats
    attended = stats.means["attended_fraction"]
    read = dict(stats.bytes_read)
    kept = _unhalved(turn.session.slots)
    halved = sum(amount * (kept if kind == "summaries" else 0.5) for kind, amount in read.items())
    return {
        "attended": attended.total,
        "attended_of": attended.weight,
        "bytes": sum(read.values()),
        "halved": halved,
        "before": stats.observation_bytes,
        "dense": stats.dense_bytes,
        "read": {kind: round(amount) for kind, amount in read.items()},
        "steps": stats.decode_steps,
        "compressed": stats.compressed_steps,
        "held": stats.active_bytes,
        "store": stats.store_bytes,
    }


def _unhalved(slots: Any) -> float:
    """Return the bytes of key summaries beside a bfloat16 store over those beside a float32 store: codes have the same size."""
    for compressor in slots.compressors.values():
        bits, page = getattr(compressor.config, "key_bits", 0), getattr(compressor.config, "page", 0)
        if bits and page:
            codes = bits / 8
            return (codes + 4 / page) / (codes + 8 / page)
    return 0.5


def at_share(stack: PolicyStack, share: float, tokens: int, forced: int) -> PolicyStack:
    """Return the stack with the budget at which its decoding attends to about ``share`` of the pairs. ``dense_below`` is off."""
    length = tokens + forced / 2
    budgeted = with_budget(stack, budget_for(share, length, uncounted_outputs_of(stack, forced / 2)))
    described = budgeted.describe()
    for each in [described, *described.get("layers", [])]:
        decode = innermost(each.get("decode") or {})
        if "dense_below" in decode:
            decode["dense_below"] = 1
    return load_stack(described)


def with_options(spec: str) -> PolicyStack:
    """Return the stack of ``NAME`` or ``NAME:option=value,...``; see the module."""
    name, _, changes = spec.partition(":")
    stack = load_stack(name)
    if not changes:
        return stack
    described = stack.describe()
    for change in changes.split(","):
        option, _, value = change.partition("=")
        part, _, key = option.rpartition(".")
        target = innermost(described["decode"]) if part in ("", "decode") else described[part]
        target[key] = _plain(value)
    described["name"] = spec
    return load_stack(described)


def _plain(value: str) -> Any:
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value, value)


def standard_error(parts: Sequence[Found], name: str) -> float:
    """Return the standard error of a figure's mean per token, from the means of blocks, whose tokens depend on each other."""
    means = [each / BLOCK for part in parts for each in part[name][: part["tokens"] // BLOCK]]
    if len(means) < 2:
        return math.nan
    middle = sum(means) / len(means)
    return math.sqrt(sum((each - middle) ** 2 for each in means) / (len(means) - 1) / len(means))


@dataclass
class Agreement:
    """Sum up what several texts gave for one stack."""

    parts: list[Found]

    @property
    def tokens(self) -> int:
        return sum(int(each["tokens"]) for each in self.parts)

    def _mean(self, name: str) -> float:
        return float(sum(sum(each[name]) for each in self.parts) / self.tokens)

    @property
    def kl(self) -> float:
        return self._mean("kl")

    @property
    def kl_error(self) -> float:
        return standard_error(self.parts, "kl")

    @property
    def same(self) -> float:
        return self._mean("same")

    @property
    def same_error(self) -> float:
        return standard_error(self.parts, "same")

    @property
    def perplexity(self) -> float:
        """Return the change of perplexity, as a share."""
        return math.exp(self._mean("loss")) - 1

    def share(self, over: str, under: str = "dense") -> float | None:
        costs = [each["costs"] for each in self.parts if "costs" in each]
        whole = sum(each[under] for each in costs)
        return sum(each[over] for each in costs) / whole if whole else None

    @property
    def attended(self) -> float | None:
        return self.share("attended", "attended_of")

    @property
    def bytes(self) -> float | None:
        return self.share("bytes")

    @property
    def bytes_bf16(self) -> float | None:
        halved = self.share("halved")
        return None if halved is None else 2 * halved

    @property
    def bytes_all(self) -> float | None:
        """The bytes with those read before the first output, of a bfloat16 store."""
        before, halved = self.share("before"), self.share("halved")
        return None if before is None or halved is None else 2 * halved + before

    def mean(self, name: str) -> float | None:
        values = [each["prefill"][name] for each in self.parts if "prefill" in each]
        return sum(values) / len(values) if values and None not in values else None


def row(label: str, found: Agreement) -> list[str]:
    return [
        label,
        f"{found.kl:.4f} ± {found.kl_error:.4f}",
        f"{100 * found.same:.1f} ± {100 * found.same_error:.1f} %",
        f"{100 * found.perplexity:+.2f} %",
        percent(found.attended),
        percent(found.bytes_bf16),
        percent(found.bytes_all),
        percent(found.mean("cells")),
        percent(found.mean("tiles")),
    ]


HEADER = ["stack", "KL", "top-1", "perplexity", "attended", "bytes", "all bytes", "cells", "tiles"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the stacks that the command line names, and print a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stacks", nargs="+", help="NAME, NAME:option=value,... or a stack file")
    parser.add_argument(
        "--phase", choices=("decode", "prefill", "both"), default="decode", help="what is sparse (default decode)"
    )
    parser.add_argument(
        "--share", type=float, default=0.05, help="budget as a share of the context; 0 = as the stack has it"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="lengths of the prompt")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--texts", type=int, default=2, help="texts of each kind, 1 or 2")
    parser.add_argument("--forced", type=int, default=FORCED, help="teacher-forced tokens of each text")
    parser.add_argument("--model", default=MODEL)
    given = parser.parse_args(arguments)
    for tokens in given.tokens:
        found: dict[str, list[Found]] = {}
        for kind in given.kinds:
            for number in range(min(given.texts, len(TEXTS[kind]))):
                started = time.monotonic()
                case = Case.of(given.model, Text(kind, number, tokens, given.forced))
                for name, part in _measured(case, given, tokens):
                    if "error" in part:
                        print(f"{name}: {part['error']}", flush=True)
                    else:
                        found.setdefault(name, []).append(part | {"kind": kind})
                print(
                    f"{kind} {number}, {tokens} tokens: loss {case.loss:.3f}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        rows = [row(name, Agreement(parts)) for name, parts in found.items()]
        rows += [
            row(f"{name}, {kind}", Agreement([each for each in parts if each["kind"] == kind]))
            for name, parts in found.items()
            for kind in given.kinds
            if len(given.kinds) > 1
        ]
        print(
            f"\n{tokens} tokens, {given.forced * given.texts * len(given.kinds)} forced tokens\n\n"
            + table(HEADER, rows)
            + "\n"
        )


def _measured(case: Case, given: argparse.Namespace, tokens: int) -> Iterable[tuple[str, Found]]:
    def sized(stack: PolicyStack) -> PolicyStack:
        return at_share(stack, given.share, tokens, given.forced) if given.share else stack

    stacks = {spec: with_options(spec) for spec in given.stacks}
    if given.phase == "prefill":
        return ((name, case.prefilling(stack)) for name, stack in stacks.items())
    if given.phase == "both":
        return case.whole({name: sized(stack) for name, stack in stacks.items()})
    dense = {"policy": "dense"}
    only: Callable[[PolicyStack], PolicyStack] = lambda stack: load_stack(stack.describe() | {"prefill": dense})  # noqa: E731
    return case.decoding({name: sized(only(stack)) for name, stack in stacks.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Every fault of a policy, on both interfaces: what the faulty request got, and what a session beside it got.

``python -m tests.core.fault_matrix docs/faults.md`` runs the matrix and renews the table of that page.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.errors import PolicyFault
from loopserve.core.guard.guard import Guard
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import VOCABULARY, tiny_model
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.prefill.dense import DensePrefill
from tests.core.acts import CLOCK, COMPRESSOR, SPARSIFIER, turncoat
from tests.core.faulty import MARKED, Halving, NaNScored, Windowed

BEGIN = "<!-- made by running it: python -m tests.core.fault_matrix docs/faults.md -->"
END = "<!-- end of what is made by running it -->"
OTHER = 40  # tokens of the message of the session beside the marked one
ANSWER = 6
STRICT_ONLY = {
    "index out of range": {"prefill"},
    "writes past the counter": {"prefill", "decode"},
    "writes into its positions past the counter": {"prefill", "decode"},
    "keeps a reference in its state": {"prefill", "decode"},
    "keeps a reference in itself": {"prefill", "decode"},
    "hidden global state": {"prefill", "decode"},
    "draws from the process's random numbers": {"prefill", "decode"},
    "turns a switch of the process": {"prefill", "decode"},
}
# What a turn finished dense looks like that was not dense from its start.
NOT_FROM_THE_START = {
    ("raises at call 2", "prefill"): "sparse before the fault, dense from it on",
    ("raises at call 2", "decode"): "sparse before the fault, dense from it on",
    ("keeps a reference in its state", "prefill"): "seen after the pass: sparse before, dense from then on",
}


@dataclass(frozen=True)
class Row:
    """One fault on one interface, as the table names it."""

    fault: str
    interface: str
    checks: str
    raised: PolicyFault | None
    dense: str
    faults: int  # counted in the turn's figures, under dense
    other: tuple[bool, bool]  # bit-identical to the same session alone: under raise, under dense


@cache
def model() -> TransformersModel:
    found = tiny_model("llama")
    set_implementation(found, IMPLEMENTATION)
    return TransformersModel(found)


def engine(prefill: Any, decode: Any, *, checks: str = "cheap", on_fault: str = "dense") -> TokenEngine:
    """Under a clock that only sleeping policies move on."""
    made = TokenEngine(model(), PolicyStack("test", prefill, decode))
    made.guard = Guard(checks=checks, on_fault=on_fault, clock=CLOCK, worked=CLOCK)
    return made


def prompt(tokens: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def steps(served: TokenEngine, session: Session, tokens: int) -> Iterator[Tensor]:
    """The logits of a turn, pass by pass; the turn is taken back if a pass raises."""
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> int:
        seen.append(logits)
        return int(logits.argmax())

    for _ in served.generate(session, prompt(tokens), choose, max_new_tokens=ANSWER):
        yield seen[-1]


def alone(served: TokenEngine, tokens: int) -> Tensor:
    return torch.stack(list(steps(served, served.session(), tokens)))


def side_by_side(served: TokenEngine) -> tuple[Tensor, Tensor | PolicyFault, Session]:
    """The session beside the marked one, pass by pass in turn; the marked one's logits or its error; the marked session."""
    marked = served.session()
    other, faulty = steps(served, served.session(), OTHER), steps(served, marked, MARKED)
    beside, found, error = [], [], None
    for _ in range(ANSWER):
        beside.append(next(other))
        try:
            if error is None:
                found.append(next(faulty))
        except PolicyFault as fault:
            error = fault
    for rest in (other, faulty):
        next(rest, None)
    return torch.stack(beside), error or torch.stack(found), marked


def policies(interface: str, fault: str) -> tuple[Any, Any]:
    if interface == "prefill":
        return Windowed(SPARSIFIER[fault]), FullDecode()
    return DensePrefill(), NaNScored() if fault == "NaN" else Halving(COMPRESSOR[fault])


@cache
def row(fault: str, interface: str) -> Row:
    checks = "strict" if interface in STRICT_ONLY.get(fault, ()) else "cheap"
    sound = policies(interface, fault)
    reference = alone(engine(*(_sound(each) for each in sound)), OTHER)
    beside_raise, raised, _ = side_by_side(engine(*policies(interface, fault), checks=checks, on_fault="raise"))
    beside_dense, found, marked = side_by_side(engine(*policies(interface, fault), checks=checks))
    assert isinstance(found, Tensor), found
    return Row(
        fault,
        interface,
        checks,
        raised if isinstance(raised, PolicyFault) else None,
        _as_a_cell(fault, interface, found),
        int(marked.stats.as_dict()["faults"]),
        (torch.equal(beside_raise, reference), torch.equal(beside_dense, reference)),
    )


def _sound(policy: Any) -> Any:
    """The same policy without its act."""
    return type(policy)() if isinstance(policy, Windowed | Halving) else policy


def _as_a_cell(fault: str, interface: str, found: Tensor) -> str:
    """How the answer of a faulty turn compares."""
    dense = alone(engine(DensePrefill(), FullDecode()), MARKED)
    if torch.equal(found, dense):
        return "a dense engine's answer, bit by bit"
    if (fault, interface) in NOT_FROM_THE_START:
        like = Windowed(turncoat if fault == "raises at call 2" else None)
        if interface == "prefill" and torch.equal(found, alone(engine(like, FullDecode()), MARKED)):
            return NOT_FROM_THE_START[fault, interface]
        sparse = alone(engine(DensePrefill(), Halving()), MARKED)
        if interface == "decode" and torch.equal(found[:2], sparse[:2]) and not torch.equal(found, sparse):
            return NOT_FROM_THE_START[fault, interface]
    if torch.allclose(found, dense, atol=1e-4) and torch.equal(found.argmax(-1), dense.argmax(-1)):
        return "a dense engine's answer, logits within 1e-4"
    return "another answer"


CASES = [(fault, "prefill") for fault in SPARSIFIER] + [(fault, "decode") for fault in [*COMPRESSOR, "NaN"]]


def rows() -> list[Row]:
    order = list(dict.fromkeys([*COMPRESSOR, *SPARSIFIER]))
    order.insert(order.index("over budget") + 1, order.pop(order.index("NaN")))
    return [row(*case) for case in sorted(CASES, key=lambda case: (order.index(case[0]), case[1] == "decode"))]


def table() -> str:
    lines = [
        "| fault | interface | seen by checks | `raise`: the faulty request | `dense`: the faulty request | every other session |",
        "|---|---|---|---|---|---|",
    ]
    for each in rows():
        said = f"`PolicyFault`, {each.raised.fault}" if each.raised is not None else "nothing"
        other = "bit-identical" if all(each.other) else "another answer"
        lines.append(f"| {each.fault} | {each.interface} | {each.checks} | {said} | {each.dense} | {other} |")
    return "\n".join(lines)


def renewed(page: str) -> str:
    """A page with the part between its markers made anew."""
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text("utf-8")), "utf-8")

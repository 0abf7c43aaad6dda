"""List the units to run, in the order of their value: a run that is broken off has the most important part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loopserve.core.errors import ConfigError
from research.evidence.units import Spec, Unit
from research.evidence_real import recipes
from research.evidence_real.case import FORCED, MODEL
from research.evidence_real.dialogues import ANSWER as ANSWERED
from research.evidence_real.needles import ANSWER
from research.evidence_real.texts import KINDS

LONGEST = 7680
"""With the tokens compared just under the model's window."""
SHARE = 0.05
READ = 2 * FORCED
"""Tokens of a text that are compared after a sparse prefill: read in one pass, they cost little."""
_SHORT = 3072
"""Below it a twentieth of the prompt is hardly more than the answer's own tokens: a tenth is given there."""
_MAIN = (
    "loopserve",
    "loopserve-paper",
    "quest",
    "snapkv",
    "streaming_llm",
    "rocketkv_mt",
    "adakv",
    "twilight",
)
"""Stacks measured first on all texts, and asked for needles."""

_RIVALS = ("loopserve", "loopserve-paper", "quest", "snapkv", "streaming_llm", "rocketkv_mt")
"""Stacks measured at every share and length: the best of each kind of choice."""

_ASKED = ("loopserve", "quest", "snapkv")
"""Stacks asked for needles at every share."""

_ONCE = ("kvzip",)
"""Stacks measured on the first texts only: reading the prompt again costs as much as ten others."""

_REALISED = (
    recipes.DEFAULT_PREFILL,
    *(f"loopserve, alpha {alpha}" for alpha in (0.9, 0.95, 0.98)),
    "loopserve-paper, alpha 0.95",
)
"""Prefill policies whose coverage of all rows is measured too."""

_LONG = (
    recipes.DEFAULT_PREFILL,
    "loopserve, alpha 0.95",
    "loopserve-paper, alpha 0.95",
    "flashprefill (preset)",
    "minference (preset)",
)
"""Prefill policies measured at the longest length too."""

Texts = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Sizes:
    """Lengths of the prompt in tokens, texts of each kind, tokens of each text that are decoded, and that are read."""

    main: int = 4096
    others: Sequence[int] = (LONGEST, 2048)
    texts: int = 2
    forced: int = FORCED
    read: int = READ
    kinds: Sequence[str] = KINDS
    dialogues: int = 7
    few: bool = False


FULL = Sizes()
QUICK = Sizes(main=1024, others=(), texts=1, forced=32, read=64, dialogues=1, few=True)


@lru_cache
def units_of(sizes: Sizes, model: str = MODEL) -> tuple[Unit, ...]:
    """Return every unit."""
    texts = [(kind, number) for number in range(sizes.texts) for kind in sizes.kinds]
    first = [(kind, 0) for kind in sizes.kinds]
    plan, main, forced = _Plan(model), sizes.main, sizes.forced
    names, wholes = recipes.decode_presets(), recipes.whole_stacks()
    alphas, presets = recipes.prefill_alphas(), recipes.prefill_weights() | recipes.prefill_presets()
    if sizes.few:
        names = {name: names[name] for name in ("loopserve", "loopserve-paper", "snapkv", "quest")}
        wholes = {"loopserve": wholes["loopserve"]}
        alphas = {name: alphas[name] for name in list(alphas)[2:4]}
        presets = {
            name: presets[name] for name in (recipes.DEFAULT_PREFILL, "minference (preset)", "tri_shape (preset)")
        }
    few = {name: names[name] for name in _MAIN if name in names}
    at = share_at(main)
    plan.decode("decode", few if sizes.few else names, first, main, forced, at)
    plan.decode("decode", few, texts, main, forced, at)
    plan.needles("needles", few, sizes.dialogues, main, (at,))
    policies, shortest = alphas | presets, min(main, *sizes.others, main)
    plan.prefill("prefill", {recipes.DEFAULT_PREFILL: policies[recipes.DEFAULT_PREFILL]}, texts, main, sizes.read)
    reading = recipes.reading_stacks()
    own = {name: recipe for name, recipe in reading.items() if name.startswith("loopserve") and "paper" not in name}
    plan.needles("needles_whole", own, sizes.dialogues, main, (at,), kind="needles_whole")
    plan.both("both", wholes, first, main, forced)
    measured = {name: policies[name] for name in _REALISED if name in policies}
    for text in first:  # breadth first, and what is of one text together: its dense prefill is computed once
        plan.claims("claims", text, (shortest, main))
        plan.prefill("prefill", policies, [text], main, sizes.read)
        if not sizes.few:
            plan.ablations([text], main, forced)
            plan.prefill("prefill_ablations", recipes.prefill_ablations(), [text], main, sizes.read)
            plan.dialogues("dialogues", recipes.talking_stacks(), [text], main)
        plan.prefill("coverage", measured, [text], shortest, sizes.read, realised=True)
    plan.needles("needles_whole", reading, sizes.dialogues, main, (at,), kind="needles_whole")
    if sizes.few:
        return tuple(plan.units)
    some = {name: names[name] for name in _RIVALS}
    others = [share for share in recipes.SHARES if share != at]
    for text in texts:
        for share in others:
            plan.decode("decode", some, [text], main, forced, share)
    for tokens in sizes.others:
        plan.decode("decode", some, first if tokens == LONGEST else texts, tokens, forced, share_at(tokens))
    plan.prefill("prefill", {name: policies[name] for name in _LONG}, first, max(sizes.others), sizes.read)
    plan.both("both", wholes, texts, main, forced)
    plan.needles("needles", {name: names[name] for name in _ASKED}, sizes.dialogues, main, others)
    often = {name: recipe for name, recipe in names.items() if name not in _ONCE}
    plan.decode("decode", often, texts, main, forced, at)
    return tuple(plan.units)


def share_at(tokens: int) -> float:
    """Return the share of the pairs that is attended to at a prompt of so many tokens, unless others are compared."""
    return SHARE if tokens > _SHORT else 2 * SHARE


def _sized(stacks: Mapping[str, Any], share: float, tokens: int, forced: int) -> dict[str, Any]:
    """Return the stacks at a budget, without those that cannot work with so small a one."""
    found = {}
    for name, recipe in stacks.items():
        with suppress(ConfigError):
            found[name] = recipes.sized(recipe, share, tokens, forced)
    return found


class _Plan:
    def __init__(self, model: str) -> None:
        self.units: list[Unit] = []
        self._model = model
        self._keys: set[str] = set()

    def _add(self, experiment: str, kind: str, label: str, text: tuple[str, int], **spec: Any) -> None:
        self._put(experiment, {"kind": kind, "label": label, "model": self._model, "text": list(text), **spec})

    def _put(self, experiment: str, spec: Spec) -> None:
        unit = Unit(experiment, spec)
        if unit.key not in self._keys:
            self._keys.add(unit.key)
            self.units.append(unit)

    def decode(
        self, experiment: str, stacks: Mapping[str, Any], texts: Texts, tokens: int, forced: int, share: float
    ) -> None:
        self._decoded(experiment, "decode", _sized(stacks, share, tokens, forced), texts, tokens, forced, share)

    def needles(
        self,
        experiment: str,
        stacks: Mapping[str, Any],
        dialogues: int,
        tokens: int,
        at: Sequence[float],
        kind: str = "needles",
    ) -> None:
        """Add dialogues with numbers to find again, under each stack at each share, and under dense attention at the first."""
        dense = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}
        for seed in range(dialogues):
            spec = {"kind": kind, "model": self._model, "tokens": tokens, "seed": seed}
            for share in at:
                given = _sized(stacks, share, tokens, ANSWER)
                if share == share_at(tokens) and kind == "needles":
                    given = {"dense": dense} | given
                for name, recipe in given.items():
                    self._put(experiment, spec | {"label": name, "stack": recipe, "share": share})

    def dialogues(self, experiment: str, stacks: Mapping[str, Any], texts: Texts, tokens: int) -> None:
        """Add conversations of several turns, under each stack with one budget for all turns."""
        for text in texts:
            for name, recipe in _sized(stacks, SHARE, tokens, ANSWERED).items():
                self._add(experiment, "dialogues", name, text, tokens=tokens, stack=recipe, share=SHARE)

    def claims(self, experiment: str, text: tuple[str, int], lengths: Sequence[int]) -> None:
        """Add what the attention of a text is like, at the first length also beside that of the other text of its kind."""
        for number, tokens in enumerate(dict.fromkeys(lengths)):
            self._add(experiment, "claims", text[0], text, tokens=tokens, pairs=number == 0)

    def ablations(self, texts: Texts, tokens: int, forced: int) -> None:
        stacks = recipes.decode_ablations(SHARE, tokens, forced)
        self._decoded("decode_ablations", "decode", stacks, texts, tokens, forced, SHARE)

    def both(self, experiment: str, stacks: Mapping[str, Any], texts: Texts, tokens: int, forced: int) -> None:
        share = share_at(tokens)
        self._decoded(experiment, "both", _sized(stacks, share, tokens, forced), texts, tokens, forced, share)

    def _decoded(
        self,
        experiment: str,
        kind: str,
        stacks: Mapping[str, Any],
        texts: Texts,
        tokens: int,
        forced: int,
        share: float,
    ) -> None:
        for text in texts:
            for name, recipe in stacks.items():
                self._add(experiment, kind, name, text, tokens=tokens, forced=forced, stack=recipe, share=share)

    def prefill(
        self,
        experiment: str,
        policies: Mapping[str, Any],
        texts: Texts,
        tokens: int,
        forced: int,
        *,
        realised: bool = False,
    ) -> None:
        extra = {"realised": True} if realised else {}
        dense = {"dense": {"policy": "dense"}} if experiment == "prefill" else {}
        for text in texts:
            for name, policy in (dense | dict(policies)).items():
                self._add(experiment, "prefill", name, text, tokens=tokens, forced=forced, policy=policy, **extra)

"""What is run, in the order of its value: a run that is broken off has the most important part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loopserve.core.errors import ConfigError
from research.evidence.units import Unit
from research.evidence_real import recipes
from research.evidence_real.agreement import FORCED, MODEL
from research.evidence_real.texts import KINDS

LONGEST = 7680
"""With the forced tokens just under the model's window."""
SHARE = 0.05
_SHORT = 3072
"""Below it a twentieth of the prompt is hardly more than the answer's own tokens: a tenth is given there."""


@dataclass(frozen=True)
class Sizes:
    """Lengths of the prompt in tokens, texts of each kind, forced tokens of each text."""

    main: int = 4096
    others: Sequence[int] = (2048, LONGEST)
    texts: int = 2
    forced: int = FORCED
    kinds: Sequence[str] = KINDS
    few: bool = False


FULL = Sizes()
QUICK = Sizes(main=1024, others=(), texts=1, forced=32, few=True)


def units_of(sizes: Sizes, model: str = MODEL) -> list[Unit]:
    """Return every unit."""
    both_texts = [(kind, number) for number in range(sizes.texts) for kind in sizes.kinds]
    first_texts = [(kind, 0) for kind in sizes.kinds]
    plan = _Plan(model, sizes.forced)
    main, main_texts = sizes.main, both_texts
    names = recipes.decode_presets()
    if sizes.few:
        names = {name: names[name] for name in ("loopserve", "loopserve-paper", "snapkv", "quest")}
    alphas = recipes.prefill_alphas()
    rivals = recipes.prefill_rivals(main)
    if sizes.few:
        alphas = {name: alphas[name] for name in list(alphas)[2:4]}
        rivals = {name: rivals[name] for name in list(rivals)[:2]}

    plan.decode("decode", names, main_texts, main, share_at(main))
    plan.prefill("prefill", alphas, main_texts, main)
    plan.prefill("prefill", rivals, main_texts, main)
    plan.both(
        "both",
        recipes.whole_stacks() if not sizes.few else {"loopserve": recipes.whole_stacks()["loopserve"]},
        main_texts,
        main,
    )
    plan.prefill("coverage", alphas, first_texts[: len(sizes.kinds)], main, realised=True)
    for tokens in sizes.others:
        plan.decode("decode", names, both_texts, tokens, share_at(tokens))
    for tokens in sizes.others:
        plan.prefill("prefill", alphas, both_texts if tokens < LONGEST else first_texts, tokens)
    few = {name: names[name] for name in _MAIN if name in names}
    for share in recipes.SHARES:
        if share != share_at(main):
            plan.decode("decode", few, both_texts, main, share)
    if not sizes.few:
        plan.ablations(first_texts, main)
        plan.prefill("prefill ablations", recipes.prefill_ablations(), first_texts, main)
        for tokens in sizes.others:
            plan.prefill(
                "prefill", recipes.prefill_rivals(tokens), both_texts if tokens < LONGEST else first_texts, tokens
            )
        plan.prefill("prefill", recipes.prefill_presets(), first_texts, main)
        for tokens in sizes.others:
            plan.both("both", recipes.whole_stacks(), first_texts, tokens)
    return plan.units


_MAIN = (
    "loopserve",
    "loopserve-paper",
    "quest",
    "snapkv",
    "tova",
    "h2o",
    "streaming_llm",
    "rocketkv_mt",
    "adakv",
    "expected_attention",
    "twilight",
    "omnikv",
    "duo",
)
"""Stacks measured at every share; the others at one."""


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
    def __init__(self, model: str, forced: int) -> None:
        self.units: list[Unit] = []
        self._model, self._forced = model, forced
        self._keys: set[str] = set()

    def _add(self, experiment: str, kind: str, label: str, where: tuple[tuple[str, int], int], **spec: Any) -> None:
        text, tokens = where
        unit = Unit(
            experiment,
            {
                "kind": kind,
                "label": label,
                "model": self._model,
                "text": list(text),
                "tokens": tokens,
                "forced": self._forced,
                **spec,
            },
        )
        if unit.key not in self._keys:
            self._keys.add(unit.key)
            self.units.append(unit)

    def decode(
        self, experiment: str, stacks: Mapping[str, Any], texts: Sequence[tuple[str, int]], tokens: int, share: float
    ) -> None:
        sized = _sized(stacks, share, tokens, self._forced)
        for text in texts:
            for name, recipe in sized.items():
                self._add(experiment, "decode", name, (text, tokens), stack=recipe, share=share)

    def ablations(self, texts: Sequence[tuple[str, int]], tokens: int) -> None:
        stacks = recipes.decode_ablations(SHARE, tokens, self._forced)
        for text in texts:
            for name, recipe in stacks.items():
                self._add("decode ablations", "decode", name, (text, tokens), stack=recipe, share=SHARE)

    def both(self, experiment: str, stacks: Mapping[str, Any], texts: Sequence[tuple[str, int]], tokens: int) -> None:
        share = share_at(tokens)
        sized = _sized(stacks, share, tokens, self._forced)
        for text in texts:
            for name, recipe in sized.items():
                self._add(experiment, "both", name, (text, tokens), stack=recipe, share=share)

    def prefill(
        self,
        experiment: str,
        policies: Mapping[str, Any],
        texts: Sequence[tuple[str, int]],
        tokens: int,
        *,
        realised: bool = False,
    ) -> None:
        extra = {"realised": True} if realised else {}
        for text in texts:
            dense = {"dense": {"policy": "dense"}} if experiment == "prefill" else {}
            for name, policy in (dense | dict(policies)).items():
                self._add(experiment, "prefill", name, (text, tokens), policy=policy, **extra)

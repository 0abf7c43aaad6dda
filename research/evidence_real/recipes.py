"""The stacks that are measured: every preset, families of settings, and changes of the default stack's fields one at a time."""

from __future__ import annotations

from typing import Any

from loopserve.api import load_stack
from loopserve.core.stack.stack import preset_names
from research.evidence.recipes import DENSE, FULL, Policy, Recipe, lines_by_alpha, preset
from research.evidence_real.stacks import at_share

SHARES = (0.03, 0.05, 0.10)
DEFAULT_PREFILL = "loopserve (preset)"
_OF_OTHER_PAGES = (
    "loopserve-first-",
    "loopserve-interval-",
    "loopserve-active",
    "-evict",
    "flowkv",
)  # equal in one turn, or ablations


def sized(recipe: Recipe, share: float, tokens: int, forced: int) -> Recipe:
    """Return a stack whose decoding attends to a share of a text's pairs, with every option written out."""
    described = at_share(load_stack(recipe), share, tokens, forced).describe()
    return {part: described[part] for part in ("prefill", "decode", "layers") if part in described}


def decode_presets() -> dict[str, Recipe]:
    """Return the decode side of every preset that has one, behind a dense prefill."""
    found = {}
    for name in preset_names():
        recipe = preset(name)
        if recipe["decode"] != FULL and not any(part in name for part in _OF_OTHER_PAGES):
            found[name] = _without_prefill(recipe)
    first = ("loopserve", "loopserve-paper")
    return {name: found[name] for name in (*first, *(each for each in found if each not in first))}


def _without_prefill(recipe: Recipe) -> Recipe:
    layers = [{key: part for key, part in each.items() if key != "prefill"} for each in recipe.get("layers", [])]
    layers = [each for each in layers if "decode" in each]
    return {"prefill": DENSE, "decode": recipe["decode"]} | ({"layers": layers} if layers else {})


def changed(**changes: Any) -> Recipe:
    """Return the default stack's decode side with other options."""
    recipe = _without_prefill(preset("loopserve"))
    recipe["decode"] |= changes
    return recipe


def decode_ablations(share: float, tokens: int, forced: int) -> dict[str, Recipe]:
    """Return the default stack's decode side at a budget with one field changed at a time, by what is changed."""
    base = sized(changed(), share, tokens, forced)
    budget = base["decode"]["budget"]

    def one(**changes: Any) -> Recipe:
        return base | {"decode": base["decode"] | changes}

    given = base["decode"]
    plain = {"rescore": "keys", "page_budget_rule": "top_k"}
    variants: dict[str, Recipe] = {"as it is": base}
    for bits in (0, 4, 8):
        pages = {"page": 16, **plain} if not bits else {}
        variants[f"key_bits {bits}" + (", pages of 16" if not bits else "")] = one(key_bits=bits, **pages)
    for page in (16, 32, 128):
        variants[f"page {page}"] = one(page=page)
    variants["page_budget_rule top_k"] = one(page_budget_rule="top_k")
    for part in (0, 0.5):
        forced_pairs = given["sink_tokens"] + given["recent_window"]
        taken = min(round(part * budget), budget - forced_pairs - 1)
        variants[f"page_budget {part:g} of the budget"] = one(page_budget=taken, **({} if taken else plain))
    variants["scope inputs"] = one(scope="inputs")
    for each in ("none", "layer_groups"):
        variants[f"share {each}"] = one(share=each)
    for memory in (0.0, 0.99):
        variants[f"memory {memory:g}"] = one(memory=memory)
    for interval in (4, 64):
        variants[f"interval {interval}"] = one(interval=interval)
    for block in ("two_hop", "dense"):
        variants[f"first_block {block}"] = one(first_block=block)
    variants["pooling 1"] = one(pooling=1)
    variants["sink_tokens 0"] = one(sink_tokens=0)
    for window in (0, 32):
        left = budget - given["sink_tokens"] - window - 1
        variants[f"recent_window {window}"] = one(recent_window=window, page_budget=min(given["page_budget"], left))
    variants["rescore keys"] = one(rescore="keys")
    variants["layers 0 and 1 dense"] = base | {"layers": [{"at": [0, 1], "decode": FULL}]}
    return {name: recipe for name, recipe in variants.items() if name == "as it is" or recipe != base}


def prefill_alphas() -> dict[str, Policy]:
    """Return lines chosen up to a share alpha of the mass alone, by our rows and cost and by the paper's, at several alphas."""
    alone = lines_by_alpha() | {"min_total_tokens": 2048}
    paper = preset("loopserve-paper")["prefill"]
    found = {f"loopserve, alpha {alpha}": alone | {"alpha": alpha} for alpha in (0.8, 0.9, 0.95, 0.98, 0.99)}
    return found | {f"loopserve-paper, alpha {alpha}": paper | {"alpha": alpha} for alpha in (0.9, 0.95, 0.98)}


def prefill_weights() -> dict[str, Policy]:
    """Return the default stack's prefill, as it is and with other least weights."""
    ours = preset("loopserve")["prefill"]
    return {DEFAULT_PREFILL: ours} | {
        f"loopserve, least weight {weight}": ours | {"least_weight": weight} for weight in (0.0001, 0.0005, 0.001)
    }


def prefill_presets() -> dict[str, Policy]:
    """Return the prefill side of every preset of others that has one, as its file says.

    Those with the sizes of a paper are left out: these are for 100,000 tokens and more, and nearly dense here.
    """
    names = [name for name in preset_names() if not name.startswith("loopserve") and not name.endswith("-paper")]
    return {
        f"{name} (preset)": recipe["prefill"]
        for name in names
        if (recipe := preset(name))["prefill"] != DENSE and name != "static_lines"
    }


def prefill_ablations() -> dict[str, Policy]:
    """Return the default stack's prefill with one field changed at a time."""
    base = preset("loopserve")["prefill"]
    return {
        "as it is": base,
        "sample_rows 64": base | {"sample_rows": 64},
        "sample_rows 512": base | {"sample_rows": 512},
        "sampling uniform": base | {"sampling": "uniform"},
        "sampling stratified": base | {"sampling": "stratified"},
        "sampling last": base | {"sampling": "last"},
        "cost tile": base | {"cost": "tile"},
        "alpha 0.95": base | {"alpha": 0.95},
        "local_window 256": base | {"local_window": 256},
    }


def whole_stacks() -> dict[str, Recipe]:
    """Return stacks with both sides sparse."""
    minference = preset("minference")["prefill"]
    snapkv, quest = preset("snapkv")["decode"], preset("quest")["decode"]
    return {
        "loopserve": preset("loopserve"),
        "loopserve-paper": preset("loopserve-paper"),
        "minference and snapkv": {"prefill": minference, "decode": snapkv},
        "minference and quest": {"prefill": minference, "decode": quest},
    }


def reading_stacks() -> dict[str, Recipe]:
    """Return stacks that are asked for numbers after a prefill of their own: both phases, and the prefill before dense decoding."""
    wholes = {name: preset(name) for name in ("loopserve", "loopserve-paper")}
    alone = {f"{name}, prefill only": preset(name)["prefill"] for name in ("loopserve", "minference")}
    return wholes | {name: {"prefill": policy, "decode": FULL} for name, policy in alone.items()}


def talking_stacks() -> dict[str, Recipe]:
    """Return stacks for conversations of several turns behind dense prefill, with everything kept and with eviction."""
    names = ("loopserve", "loopserve-paper", "quest", "snapkv", "flowkv")
    kept = {name: _without_prefill(preset(name)) for name in names}
    evicting = {"snapkv-evict": _without_prefill(preset("snapkv-evict"))}
    streaming = _without_prefill(preset("streaming_llm"))
    streaming["decode"] |= {"retention": "evict"}
    return kept | evicting | {"streaming_llm, evicting": streaming}

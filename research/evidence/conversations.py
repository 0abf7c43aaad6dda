"""Units of kind ``talk``: the bundled model holds recall dialogues under a stack; answers, and what they took."""

from __future__ import annotations

from typing import Any

from loopserve.api import Engine, load_stack
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, Turn, make_dialogues
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import Mean, TurnStats
from research.evidence.recording import loaded
from research.evidence.units import Found, Spec

_SPARE = 16  # tokens an answer may be longer than the right one


def hold(spec: Spec) -> Found:
    """Hold the dialogues of a spec: ``model``, ``stack`` (as a stack file says it), ``task`` (fields of ``RecallTask``),
    ``dialogues``, ``seed``, and the flags ``cover`` (realised coverage of the prefill) and ``survival`` (which facts are still
    stored when they are asked for).

    The history holds the model's own answers. ``answers``: one list per figure, all equally long, an entry per answer in
    the order they were given. ``sums``: totals over all answers, from which shares can be made over any set of units.
    """
    network, tokenizer = loaded(spec["model"])
    stack = load_stack({"version": 1, "name": "evidence", **spec["stack"]})
    engine = Engine(network, tokenizer, stack, measure_coverage=bool(spec.get("cover")))
    task = RecallTask(**spec["task"])
    answers: dict[str, list[Any]] = {}
    total = TurnStats(0)
    for dialogue in make_dialogues(task, spec["dialogues"], HELD_OUT_SEED + spec["seed"]):
        session = engine.token_engine.session()
        messages: list[dict[str, str]] = []
        for number, turn in enumerate(dialogue.turns):
            kept = _survival(session, tokenizer, turn) if spec.get("survival") else None
            messages.append({"role": "user", "content": turn.text})
            text = _answer(engine, session, messages, len(turn.answer.split()))
            messages.append({"role": "assistant", "content": text})
            stats = session.stats
            answer = {
                "turn": number,
                "right": int(text == turn.answer),
                "parts": parts_right(text, turn.answer),
                "distances": list(turn.distances),
                "outputs": stats.output_tokens,
                "ttft_ms": round(stats.ttft_ms, 1),
            } | ({} if kept is None else {"kept": kept})
            for name, value in answer.items():
                answers.setdefault(name, []).append(value)
            total.merge(stats)
    return {"answers": answers, "sums": sums_of(total)}


def _answer(engine: Engine, session: Session, messages: list[dict[str, str]], words: int) -> str:
    """The model's answer to the last message, at most ``words`` and some more long."""
    last = session.tokens[-1] if session.tokens and session.tokens[-1] in engine.stop_ids else None
    new = engine.tokenizer.turn_tokens(messages, last)
    sampling = SamplingConfig(max_new_tokens=words + _SPARE)
    return engine.tokenizer.decode(list(engine.token_engine.generate(session, new, sampling, engine.stop_ids))).strip()


def parts_right(answer: str, gold: str) -> list[int]:
    """For each part of the right answer (``place is code .``), whether the answer has it, wherever it stands there."""
    given = _parts(answer)
    return [int(part in given) for part in _parts(gold)]


def _parts(answer: str) -> list[str]:
    return [part.strip() for part in f" {answer} ".split(" . ") if part.strip()]


def _survival(session: Session, tokenizer: Any, turn: Turn) -> list[float | None]:
    """For each asked place, the share of its fact's pairs that the store still holds before the turn, mean over layers and
    KV heads; None for what is stated in this turn.
    """
    words: list[str] = tokenizer.convert_ids_to_tokens(session.tokens)
    return [_held(session, words, key) for key in turn.keys]


def _held(session: Session, words: list[str], key: str) -> float | None:
    fact = ["the", "code", "of", key, "is"]
    start = next((at for at in range(len(words)) if words[at : at + 5] == fact), None)
    if start is None:
        return None
    stop = words.index(".", start)
    shares = Mean()
    for layer in session.cache.layers:
        positions = layer.positions()
        inside = ((positions >= start + 3) & (positions < stop)).float()
        heads = inside.expand(layer.store.heads, -1) if positions.dim() == 1 and layer.store else inside
        shares.add(float(heads.sum(-1).mean()) / (stop - start - 3))
    return None if shares.value is None else round(shares.value, 4)


def sums_of(stats: TurnStats) -> dict[str, float]:
    """Totals of merged turns, each share's numerator and denominator apart."""
    found = {
        "steps": stats.decode_steps,
        "compressed_steps": stats.compressed_steps,
        "outputs": stats.output_tokens,
        "decode_ms": round(stats.decode_ms, 1),
        "bytes": sum(stats.bytes_read.values()),
        "observation_bytes": stats.observation_bytes,
        "dense_bytes": stats.dense_bytes,
        "reselections": stats.counters.get("reselections", 0.0),
        "fallbacks": sum(count for name, count in stats.counters.items() if name.startswith("fallback")),
        "store_bytes": stats.store_bytes,
        "active_bytes": stats.active_bytes,
    }
    for short, name in _MEANS.items():
        if name in stats.means:
            found |= {short: stats.means[name].total, f"{short}_of": stats.means[name].weight}
    return found


_MEANS = {
    "attended": "attended_fraction",
    "cells": "prefill_cell_density",
    "tiles": "prefill_tile_density",
    "realised": "coverage_realised",
}

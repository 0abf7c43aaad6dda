"""Claim 6, without answers: what share of the attention prefill policies hold, in the mean and in the worst tenth of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loopserve.api import load_stack
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask
from loopserve.bench.speed.parity import as_call
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import LinePattern
from loopserve.policies.draws import SAMPLED_ROWS
from research.evidence.lines import row_coverage, softmax_rows, worst_tenth
from research.evidence.recipes import FULL, prefill_policies
from research.evidence.recording import Recording, record
from research.evidence.units import Found, Spec, Unit

NAME = "coverage"


def units(tokens: int, dialogues: int, positions: tuple[str, ...], model: str = "demo") -> list[Unit]:
    """One dialogue under every prefill policy a unit."""
    policies = {
        f"{family}, {setting}": policy
        for family, settings in prefill_policies(tokens).items()
        for setting, policy in settings.items()
    }
    return [
        Unit(
            NAME,
            {
                "kind": NAME,
                "label": f"question at {position}, dialogue {seed}",
                "model": model,
                "task": {"tokens": tokens, "turns": 3, "keys": 2, "position": position},
                "seed": 200 + seed,
                "policies": policies,
            },
        )
        for position in positions
        for seed in range(dialogues)
    ]


def measure(spec: Spec) -> Found:
    """By policy: ``cells`` and ``tiles`` computed, and of the turns after the first the share of the mass inside, mean over
    layers and heads: over all rows (``mean``, ``worst`` tenth), over rows that had no say in the choice (``held_out``,
    ``held_out_worst``), and over the rows of the question (``question``). ``lines``: chosen per layer and head in the last
    turn, where they are lines.
    """
    recording = record(spec["model"], RecallTask(**spec["task"]), HELD_OUT_SEED + spec["seed"])
    judged = {label: _Judged(policy) for label, policy in spec["policies"].items()}
    for layer in recording.layers:
        states: dict[str, dict[Any, Any]] = {label: {} for label in judged}
        for turn in range(recording.turns):
            # One softmax serves all policies; the first turn is only there for those that remember it.
            rows = softmax_rows(recording.block(layer, *recording.rows_of(turn))) if turn else None
            for label, each in judged.items():
                each.judge(recording, call_of(recording, layer, turn, states[label]), rows)
    return {label: each.found() for label, each in judged.items()}


class _Judged:
    """A sparsifier and what its patterns held, one value per layer and turn."""

    def __init__(self, policy: dict[str, Any]) -> None:
        self.sparsifier = load_stack({"version": 1, "name": "evidence", "prefill": policy, "decode": FULL}).prefill
        self.figures: dict[str, list[float]] = {}
        self.lines: list[list[int]] = []

    def judge(self, recording: Recording, inputs: AttentionInputs, rows: tuple[Tensor, Tensor] | None) -> None:
        """rows: probabilities and columns of the call's rows; None where the call is only to be remembered."""
        pattern = self.sparsifier.sparsify(inputs)
        if rows is None:
            return
        by_row = row_coverage(pattern, *rows)
        held_out = by_row[:, _unused(inputs)]
        first, last = (at - inputs.turn_start for at in recording.question_rows(inputs.turn))
        for name, value in {
            "cells": pattern.cell_density(),
            "tiles": pattern.tile_density(),
            "mean": by_row,
            "worst": worst_tenth(by_row),
            "held_out": held_out,
            "held_out_worst": worst_tenth(held_out),
            "question": by_row[:, first:last],
        }.items():
            self.figures.setdefault(name, []).append(float(value.mean()))
        if inputs.turn == recording.turns - 1 and isinstance(pattern, LinePattern):
            self.lines.append((pattern.verticals.sum(1) + pattern.slashes.sum(1)).tolist())

    def found(self) -> dict[str, Any]:
        return {name: round(sum(values) / len(values), 5) for name, values in self.figures.items()} | {
            "lines": self.lines
        }


def call_of(recording: Recording, layer: int, turn: int, state: dict[Any, Any] | None = None) -> AttentionInputs:
    """One layer's prefill call of one turn, as the engine would hand it to a sparsifier."""
    start, stop = recording.rows_of(turn)
    call = as_call(recording.block(layer, start, stop))
    return replace(
        call,
        layer=replace(call.layer, index=layer),
        turn=turn,
        turn_start=start,
        state={} if state is None else state,
    )


def _unused(inputs: AttentionInputs) -> Tensor:
    """Rows that the sparsifier did not look at, as far as its call shows: bool ``[m]``."""
    unused = torch.ones(inputs.new_tokens, dtype=torch.bool, device="cpu")
    if SAMPLED_ROWS in inputs.scratch:
        unused[inputs.scratch[SAMPLED_ROWS]] = False
    for key in inputs.scratch:
        if isinstance(key, tuple) and key[0] == "rows":
            unused[list(key[1])] = False
    return unused if bool(unused.any()) else ~unused

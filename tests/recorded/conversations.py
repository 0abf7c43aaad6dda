"""Hold one conversation under every preset and record what came out: tokens, decode logits, figures.

``python -m tests.recorded.conversations FILE`` writes the recording; ``test_recorded.py`` compares with the committed one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from loopserve import Engine
from loopserve.api import load_stack
from loopserve.bench.budget import with_budget
from loopserve.bench.recall import RecallTask, make_dialogues
from loopserve.models.loading import load

BUDGET = 96
CHUNK_TOKENS = 200
FIGURES = (
    "prompt_tokens",
    "reused_tokens",
    "output_tokens",
    "prefill_cell_density",
    "attended_fraction",
    "compressed_share",
    "reselected_steps",
    "kv_bytes_per_token",
    "store_bytes",
    "active_bytes",
)


@cache
def loaded() -> tuple[Any, Any]:
    return load("demo", dtype="float32", device="cpu")


def presets() -> list[str]:
    folder = resources.files("loopserve") / "stacks"
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))


def record(preset: str) -> list[dict[str, Any]]:
    """One entry per turn; ``logits`` is the digest of the float32 logits of the turn's decode steps."""
    model, tokenizer = loaded()
    dialogue = make_dialogues(RecallTask(tokens=1200, turns=3, keys=2, position="middle"), 1, 5)[0]
    engine = Engine(model, tokenizer, with_budget(load_stack(preset), BUDGET), chunk_tokens=CHUNK_TOKENS)
    rows: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(output.detach().reshape(-1, output.shape[-1])[-1].clone())
    )
    turns = []
    try:
        with engine.session() as chat:
            for turn in dialogue.turns:
                rows.clear()
                reply = chat.send(turn.text, max_new_tokens=48)
                steps = torch.stack(rows[len(rows) - max(1, len(reply.token_ids) - 1) :]).float().contiguous()
                found = reply.stats.as_dict()
                turns.append(
                    {
                        "tokens": list(reply.token_ids),
                        "logits": hashlib.sha256(steps.numpy().tobytes()).hexdigest()[:16],
                        "last": [round(float(each), 4) for each in steps[-1, :8]],
                        **{name: found[name] for name in FIGURES},
                    }
                )
    finally:
        handle.remove()
    return turns


def main() -> None:
    recording = {preset: record(preset) for preset in presets()}
    lines = (f"{json.dumps(preset)}: {json.dumps(turns)}" for preset, turns in recording.items())
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

"""Does the shipped folder compute what the training model computes? `python -m research.training.check_export RUN STAGE`."""

from __future__ import annotations

import argparse
import sys
from random import Random
from typing import Any

import torch

from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, lay_out
from research.training.batches import KINDS, WORDS, collate
from research.training.model import RecallLlama, Shape
from research.training.train import RUNS, WEIGHTS

TOLERANCE = 1e-4


@torch.no_grad()
def difference(run: str, stage: str) -> float:
    """Largest difference of logits at answer rows, both in float32, the training weights rounded to float16 first."""
    from transformers import AutoModelForCausalLM

    ours = RecallLlama(Shape(vocab_size=len(WORDS)), KINDS)
    ours.load_state_dict(torch.load(RUNS / run / f"{stage}.pt", weights_only=True)["model"])
    for parameter in ours.parameters():
        parameter.copy_(parameter.half().float())
    theirs: Any = AutoModelForCausalLM.from_pretrained(WEIGHTS / run, dtype=torch.float32)
    batch = collate([lay_out(RecallTask(tokens=1024), HELD_OUT_SEED)], Random(0))
    hidden, _ = ours(batch.ids, batch.positions, batch.rows, [])
    logits = theirs(batch.ids).logits[0, batch.rows[0]]
    return float((ours.logits(hidden)[0] - logits).abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m research.training.check_export", description=__doc__)
    parser.add_argument("run", help="name of the training run")
    parser.add_argument("stage", help="name of the stage whose weights are compared")
    given = parser.parse_args()
    found = difference(given.run, given.stage)
    print(f"largest difference of logits: {found:.2e}")
    sys.exit(found > TOLERANCE)

"""Train the bundled demo model: `python -m research.training.train recall` (add `--resume STAGE` to go on after a saved stage).

Every stage ends with a checkpoint and a report in `.training/RUN/` and an export into the package; the report states
seed, steps, seconds, machine and held-out accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, lay_out
from research.training.batches import (
    FORESIGHT_HEADS,
    IGNORE,
    KINDS,
    LOOKAHEAD,
    OWNER_HEAD,
    PREVIOUS_HEAD,
    SOURCE_HEAD,
    WORDS,
    Batch,
    collate,
)
from research.training.curriculum import CURRICULA, Stage, draw_batch
from research.training.export import export
from research.training.model import RecallLlama, Shape
from research.training.muon import Muon

RUNS = Path(".training")
WEIGHTS = Path("loopserve/models/weights")
EXPORT_EVERY = 420.0  # seconds, inside long stages


def losses(model: RecallLlama, batch: Batch, stage: Stage) -> tuple[dict[str, Tensor], Tensor]:
    """The weighted parts of the loss, and the greedy prediction at every row [batch, count]."""
    targets = [target for target in batch.targets if _IMPORTANCE[f"{target.layer}.{target.head}"](stage)]
    hidden, attention = model(batch.ids, batch.positions, batch.rows, targets)
    wanted = batch.wanted.flatten(0, 1)
    rows = hidden.flatten(0, 1)
    real = wanted[:, 0] != IGNORE
    logits = model.logits(rows[real])
    parts = {"next": F.cross_entropy(logits, wanted[real, 0])}
    for name, loss in attention.items():
        parts[f"attention {name}"] = _IMPORTANCE[name](stage) * loss
    if stage.lookahead:
        features, labels = [], []
        for offset in range(1, 2 * LOOKAHEAD):
            chosen = wanted[:, offset] != IGNORE
            features.append(rows[chosen] @ model.lookahead[offset - 1].T)
            labels.append(wanted[chosen, offset])
        total = F.cross_entropy(model.logits(torch.cat(features)), torch.cat(labels), reduction="sum")
        parts["lookahead"] = stage.lookahead * 0.2 * total / real.sum()
    predictions = torch.full(wanted.shape[:1], IGNORE)
    predictions[real] = logits.detach().argmax(-1)
    return parts, predictions.view(batch.rows.shape)


def right_answers(batch: Batch, predictions: Tensor) -> list[tuple[int, int, bool]]:
    """(dialogue, turn, whole answer right) of every answer: teacher-forced argmax, the same as greedy exact match."""
    same = predictions == batch.wanted[..., 0]
    return [(index, turn, bool(same[index, first:end].all())) for index, turn, first, end in batch.answers]


@torch.no_grad()
def held_out(model: RecallLlama, task: RecallTask, count: int, seed: int = HELD_OUT_SEED, group: int = 8) -> float:
    """Share of whole answers right over all turns of `count` held-out dialogues."""
    right: list[bool] = []
    for first in range(0, count, group):
        layouts = [lay_out(task, seed + index) for index in range(first, min(first + group, count))]
        batch = collate(layouts, Random(0))
        _, predictions = losses(model, batch, _PLAIN)
        right.extend(ok for _, _, ok in right_answers(batch, predictions))
    return sum(right) / len(right)


_IMPORTANCE: dict[str, Callable[[Stage], float]] = {
    "{}.{}".format(*OWNER_HEAD): lambda stage: 0.5 * stage.attention,
    "{}.{}".format(*PREVIOUS_HEAD): lambda stage: 0.5 * stage.attention,
    "{}.{}".format(*SOURCE_HEAD): lambda stage: stage.attention,
    **{"{}.{}".format(*head): lambda stage: stage.foresight for head in FORESIGHT_HEADS},
}
_PLAIN = Stage("evaluation", 0, (1, 1), 1, 1)


class Trainer:
    """Model, optimisers, and the counters that end up in the reports."""

    def __init__(self, run: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.run, self.seed = run, seed
        self.folder = RUNS / run
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = RecallLlama(Shape(vocab_size=len(WORDS)), KINDS)
        matrices = [p for name, p in self.model.named_parameters() if p.dim() >= 2 and name != "embedding"]
        others = [p for name, p in self.model.named_parameters() if p.dim() < 2 or name == "embedding"]
        self.muon = Muon(matrices, lr=0.01, momentum=0.95)
        self.adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.seconds, self.words = 0, 0.0, 0
        self.history: list[dict[str, object]] = []

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds, self.words = state["step"], state["seconds"], state["words"]
        self.history = state["history"]

    def save(self, name: str) -> None:
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "words": self.words,
            "history": self.history,
        }
        torch.save(state, self.folder / f"{name}.partial")
        os.replace(self.folder / f"{name}.partial", self.folder / f"{name}.pt")

    def set_rate(self, factor: float) -> None:
        for optimiser, rate in ((self.muon, 0.01), (self.adam, 2e-3)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor

    def train(self, stage: Stage) -> None:
        start = last_log = last_export = time.monotonic()
        right = 0.0
        seen = 0
        while (spent := time.monotonic() - start) < stage.seconds and right < stage.goal:
            self.set_rate(_rate(stage, spent) * min(1.0, (self.step + 1) / 30))
            rng = Random(self.seed * 1_000_003 + self.step)
            batch = collate(draw_batch(stage, rng), rng, stage.skips, noise=0.03 if rng.random() < 0.5 else 0.0)
            parts, predictions = losses(self.model, batch, stage)
            torch.autograd.backward(torch.stack(list(parts.values())).sum())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimiser in (self.muon, self.adam):
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            self.step += 1
            self.words += batch.ids.numel()
            answers = right_answers(batch, predictions)
            now = 100 * sum(ok for _, _, ok in answers) / len(answers)
            seen += 1
            right += (now - right) / min(seen, 30)
            if time.monotonic() - last_log > 15:
                last_log = time.monotonic()
                shown = " ".join(f"{name} {part.item():.3f}" for name, part in parts.items())
                speed = self.words_per_second(start)
                print(f"{stage.name} {spent:5.0f} s step {self.step} right {right:5.1f} {speed} | {shown}", flush=True)
            if time.monotonic() - last_export > EXPORT_EVERY:
                last_export = time.monotonic()
                self.export_now(stage, spent)
                self.save(f"{stage.name}-unfinished")
        self.seconds += time.monotonic() - start
        self.report(stage, time.monotonic() - start, right)
        self.save(stage.name)
        self.export_now(stage, 0.0)

    def words_per_second(self, start: float) -> str:
        before = sum(int(str(entry["words"])) for entry in self.history)
        return f"{(self.words - before) / (time.monotonic() - start):.0f} words/s"

    def export_now(self, stage: Stage, spent: float) -> None:
        notes = {"run": self.run, "stage": stage.name, "seed": self.seed, "steps": self.step}
        export(self.model, WEIGHTS / self.run, {**notes, "seconds": round(self.seconds + spent)})

    def report(self, stage: Stage, seconds: float, right: float) -> None:
        """Held-out accuracy at a few lengths, appended to `report.json`."""
        scores = {}
        for tokens, count in ((64, 64), (256, 24), (512, 16), (1024, 12), (2048, 8)):
            if tokens <= 2 * stage.tokens[1]:
                task = RecallTask(tokens=tokens, turns=3 if tokens > 200 else 1, keys=2 if tokens > 64 else 1)
                scores[str(tokens)] = round(held_out(self.model, task, count), 3)
        before = sum(int(str(entry["words"])) for entry in self.history)
        self.history.append(
            {
                "stage": stage.name,
                "seconds": round(seconds),
                "steps": self.step,
                "words": self.words - before,
                "right in training": round(right, 1),
                "held out": scores,
            }
        )
        machine = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}, float32"
        report = {"seed": self.seed, "machine": machine, "seconds": round(self.seconds), "stages": self.history}
        (self.folder / "report.json").write_text(json.dumps(report, indent=1))
        print("==", json.dumps(self.history[-1]), flush=True)


def _rate(stage: Stage, spent: float) -> float:
    first, last = stage.rate
    return first + (last - first) * min(1.0, spent / stage.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=sorted(CURRICULA))
    parser.add_argument("--resume", help="name of a saved stage of this run to go on after")
    parser.add_argument("--start-from", type=Path, help="a saved stage of another run to start from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--until", help="stop after this stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(options.run, options.seed)
    stages = list(CURRICULA[options.run])
    if options.resume:
        trainer.load(trainer.folder / f"{options.resume}.pt")
        done = [stage.name for stage in stages].index(options.resume)
        stages = stages[done + 1 :]
    elif options.start_from:
        trainer.load(options.start_from)
    for stage in stages:
        trainer.train(stage)
        if stage.name == options.until:
            break


if __name__ == "__main__":
    main()

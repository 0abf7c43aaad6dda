"""Compare presets with dense attention on a text: cells computed, KL and top-1 of the predictions that follow.

``python -m research.prefill_agreement MODEL TEXT [TEXT ...] --tokens 2048 4096 --stack minference --stack duo``

Each text is read as one first turn of the given length; the tokens that follow it are teacher-forced. A text ``pydoc:`` is the help
topics that come with Python. KL is that of the stack's prediction from dense's, in nats, mean over the forced tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time

import torch
from torch import Tensor

from loopserve import Engine
from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.models.loading import load


def text_of(name: str) -> str:
    """Return a file's text, or Python's help topics."""
    if name != "pydoc:":
        return Path(name).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics[each] for each in sorted(topics))


def predictions(engine: TokenEngine, ids: Sequence[int], outputs: int) -> tuple[Tensor, dict[str, float | None]]:
    """Return the log probabilities ``[outputs, vocabulary]`` of the last ``outputs`` tokens, and figures of the turn."""
    prompt, forced = ids[:-outputs], iter(ids[-outputs:])
    seen: list[Tensor] = []

    def choose(logits: Tensor, forced: Iterator[int] = forced) -> int:
        seen.append(logits.float().log_softmax(-1))
        return next(forced)

    session = engine.session()
    before = process_time()
    for _ in engine.generate(session, list(prompt), choose, max_new_tokens=outputs):
        pass
    figures = session.stats.as_dict()
    cells, attended = figures["prefill_cell_density"], figures["attended_fraction"]
    return torch.stack(seen), {"cells": cells, "attended": attended, "seconds": process_time() - before}


def main() -> None:
    """Print one row per length and stack, mean over the texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--stack", action="append", required=True)
    parser.add_argument("--outputs", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=0, help="tokens per prefill call; 0 = the whole turn in one")
    given = parser.parse_args()
    model, tokenizer = load(given.model, dtype="float32", device="cpu")
    print("tokens  stack                  cells  attended      KL  (each text)              top-1  CPU s", flush=True)
    for tokens in given.tokens:
        base: dict[str, Tensor] = {}
        for stack in ["dense", *given.stack]:
            engine = Engine(model, tokenizer, load_stack(stack), chunk_tokens=given.chunk or tokens).token_engine
            divergences, same, cells, attended, seconds = [], [], [], [], 0.0
            for text in given.texts:
                ids = tokenizer.encode(text_of(text))[: tokens + given.outputs]
                if len(ids) < tokens + given.outputs:
                    raise SystemExit(f"{text}: has {len(ids)} tokens, {tokens + given.outputs} are needed")
                found, figures = predictions(engine, ids, given.outputs)
                dense = base.setdefault(text, found)
                divergences.append(float((dense.exp() * (dense - found)).sum(-1).mean()))
                same.append(float((dense.argmax(-1) == found.argmax(-1)).float().mean()))
                cells.append(figures["cells"] or 0.0)
                attended.append(1.0 if figures["attended"] is None else figures["attended"])
                seconds += figures["seconds"] or 0.0
            share = [sum(each) / len(each) for each in (cells, attended, divergences, same)]
            each = " ".join(f"{value:.4f}" for value in divergences)
            print(
                f"{tokens:6d}  {stack:20.20s}  {share[0]:6.1%}  {share[1]:8.1%}  {share[2]:6.4f}  ({each})  "
                f"{share[3]:5.2f}  {seconds:5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

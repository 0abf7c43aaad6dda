"""Measure how far decode policies are from dense attention on a text that a model reads, by KL and by the likeliest token.

``python -m research.rivals MODEL TEXT --tokens 4096 --share 0.05 --share 0.1``: MODEL as ``loopserve run`` takes it, TEXT a file of
plain text. The prompt is read dense, once per part of the text. Its last 64 tokens are then a turn of their own under each stack, which
answers with the tokens that follow in the text. ``--turns 3`` reads the prompt in so many turns instead, each stack from the first on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopserve.api import Engine, load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.stack.stack import PolicyStack

_LAST = 64  # tokens of the prompt that are a turn of their own
_REPLY = 32  # tokens of the text that answer a turn before the last


def stacks(budget: int, turns: int) -> dict[str, PolicyStack]:
    """Return the stacks to compare, with ``budget`` KV pairs per KV head; a policy whose budget counts per turn gets its part."""
    loopserve = load_stack("loopserve").describe()["decode"] | {"budget": budget, "page_budget": budget // 2}
    quest = {"policy": "quest", "budget": budget, "page": 16}
    first_dense = [{"at": [0, 1], "decode": {"policy": "full"}}]
    snapkv = {"policy": "snapkv", "budget": budget, "window": 32}
    evicted = snapkv | {"retention": "evict"}
    decodes: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "loopserve": (loopserve, []),
        "quest": (quest, first_dense),
        "snapkv": (snapkv, []),
    }
    if turns > 1:
        part = evicted | {"budget": budget // turns}
        decodes = decodes | {
            "snapkv, evict": (evicted, []),
            "flowkv": ({"policy": "flowkv", "inner": part}, []),
            "rkv, evict": ({"policy": "rkv", "budget": budget, "retention": "evict"}, []),
        }
    else:
        generous = quest | {"budget": 4 * budget}
        decodes = decodes | {
            "twilight .95 of quest's 4 budgets": ({"policy": "twilight", "inner": generous}, first_dense),
            "twilight .8 of quest's 4 budgets": ({"policy": "twilight", "top_p": 0.8, "inner": generous}, first_dense),
            "twilight .8 of all pairs": ({"policy": "twilight", "top_p": 0.8, "inner": {"policy": "full"}}, []),
            "twilight .95 of loopserve": ({"policy": "twilight", "inner": loopserve}, []),
            "omnikv": ({"policy": "omnikv", "budget": budget}, []),
            "rkv": ({"policy": "rkv", "budget": budget}, []),
            "kvzip": ({"policy": "kvzip", "budget": budget}, []),
        }
    made = {}
    for name, (decode, layers) in decodes.items():
        made[name] = load_stack({"name": "rivals", "prefill": {"policy": "dense"}, "decode": decode, "layers": layers})
    return made


def answer(engine: TokenEngine, session: Session, prompt: Sequence[int], gold: Sequence[int]) -> Tensor:
    """Read a prompt and answer with given tokens; return the logits for each but the first ``[n - 1, V]``, float32."""
    seen: list[Tensor] = []
    tokens = iter(gold)

    def dictated(logits: Tensor) -> int:
        seen.append(logits.float().cpu())
        return next(tokens)

    list(engine.generate(session, prompt, dictated, max_new_tokens=len(gold)))
    return torch.stack(seen[1:])  # the first token is chosen by the prefill's last row


def agreement(dense: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(dense || other) in nats and whether the likeliest tokens are the same, for each token ``[n]``."""
    logs, others = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return (logs.exp() * (logs - others)).sum(-1), dense.argmax(-1) == other.argmax(-1)


def taken_over(engine: TokenEngine, stack: PolicyStack, read: Session) -> Session:
    """Return a session under another stack that holds what ``read`` holds."""
    session = engine.session(stack)
    session.tokens, session.cache, session.rotation = list(read.tokens), read.cache.fork(), read.rotation
    return session


def part_of(
    engine: TokenEngine, tokens: list[int], length: int, budget: int, turns: int, only: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield KL, agreement and figures by stack for one part of a text, dense first. only: stacks to leave out the others."""
    gold = tokens[length:]
    named = stacks(budget, turns)
    size = length // turns
    read = engine.session()
    if turns == 1:
        list(engine.generate(read, tokens[: length - _LAST], lambda _: tokens[length - _LAST], max_new_tokens=1))
    dense = torch.empty(0, dtype=torch.float32, device="cpu")
    for name, stack in ({"dense": load_stack("dense")} | {each: named[each] for each in only if each in named}).items():
        if turns == 1:
            session = taken_over(engine, stack, read)
            logits = answer(engine, session, tokens[length - _LAST + 1 : length], gold)
        else:
            session = engine.session(stack)
            for turn in range(turns):
                start, last = turn * size, turn == turns - 1
                end = length if last else start + size - _REPLY
                logits = answer(engine, session, tokens[start:end], gold if last else tokens[end : start + size])
        dense = logits if name == "dense" else dense
        kl, same = agreement(dense, logits)
        stats = session.stats.as_dict()
        yield (
            name,
            {
                "kl": kl.tolist(),
                "same": same.tolist(),
                "attended": stats["attended_fraction"],
                "bytes": (stats["kv_bytes_per_token"] or 0) / (stats["dense_kv_bytes_per_token"] or 1),
            },
        )
        session.close()


def table(parts: list[dict[str, Any]]) -> str:
    """Return a table of all parts together: mean KL and its standard error over tokens, agreement, pairs and bytes."""
    lines = ["| stack | KL | top-1 | attended | bytes |", "|---|---|---|---|---|"]
    for name in parts[0]:
        kl = torch.tensor([each for part in parts for each in part[name]["kl"]], dtype=torch.float64, device="cpu")
        same = [each for part in parts for each in part[name]["same"]]
        attended, read = (sum(part[name][what] for part in parts) / len(parts) for what in ("attended", "bytes"))
        error = float(kl.std()) / len(kl) ** 0.5
        lines.append(
            f"| {name} | {float(kl.mean()):.4f} ± {error:.4f} | {sum(same) / len(same):.3f} | {attended:.1%} | {read:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--outputs", type=int, default=129, help="tokens of the answer; the first is not compared")
    parser.add_argument("--parts", type=int, default=3, help="parts of the text, one after another")
    parser.add_argument("--first", type=int, default=0, help="number of the first part")
    parser.add_argument("--share", type=float, action="append", help="budget as a share of the prompt; may be repeated")
    parser.add_argument("--turns", type=int, default=1, help="turns that the prompt is read in")
    parser.add_argument(
        "--rows", type=Path, help="file that keeps the rows of each stack; what is in it is not run again"
    )
    options = parser.parse_args()
    engine = Engine.from_pretrained(options.model, stack="dense", dtype="float32", device="cpu")
    ids = engine.tokenizer.answer_tokens(options.text.read_text("utf-8"))
    step = options.tokens + options.outputs
    kept: dict[str, Any] = json.loads(options.rows.read_text()) if options.rows and options.rows.exists() else {}
    for share in options.share or [0.05, 0.1]:
        parts, budget = [], round(share * options.tokens)
        names = ["dense", *stacks(budget, options.turns)]
        for part in range(options.first, options.first + options.parts):
            tokens = list(ids[part * step : (part + 1) * step])
            if len(tokens) < step:
                raise SystemExit(f"the text has {len(ids)} tokens: part {part} of {step} tokens is not in it")
            key = f"{options.text.name} {options.tokens} {options.outputs} {options.turns} {share} {part}"
            found = kept.setdefault(key, {})
            missing = [name for name in names if name not in found]
            if missing:
                with torch.inference_mode():
                    for name, figures in part_of(
                        engine.token_engine, tokens, options.tokens, budget, options.turns, missing
                    ):
                        found[name] = figures
                        print(f"{key}: {name}", file=sys.stderr, flush=True)
                        if options.rows:
                            options.rows.write_text(json.dumps(kept))
            parts.append({name: found[name] for name in names})
        print(
            f"\n{options.tokens} tokens, budget {share:.0%}, {len(parts)} x {options.outputs - 1} tokens\n\n{table(parts)}"
        )


if __name__ == "__main__":
    main()

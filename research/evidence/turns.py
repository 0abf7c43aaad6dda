"""Claim 5: what is evicted in one turn is missed in a later one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopserve.bench.budget import innermost
from research.evidence.pictures import Pictures, dressed, lines
from research.evidence.recipes import DENSE, FULL, Policy, average_context, decode_preset, observing
from research.evidence.talks import talk, tallies
from research.evidence.tally import Share, Tally
from research.evidence.units import Row, Unit
from research.evidence.words import listed, percent, points, table, verdict

NAME = "turns"
_TURNS = 4
_POOLS = {"keep": {"pool": "full"}, "evict": {"pool": "active"}}
_SCORED = ("snapkv", "adakv", "keydiff", "h2o", "tova", "streaming_llm")


def units(tokens: int, dialogues: int, shares: Sequence[float]) -> list[Unit]:
    """Dialogues of four turns, each method once with the whole store kept and once with the rest evicted."""
    task = {"tokens": tokens, "turns": _TURNS, "keys": 1, "position": "mixed"}
    made = [talk(NAME, "full", {"prefill": DENSE, "decode": FULL}, task, dialogues, seed=500, share=1.0, kept="keep")]
    for share in shares:
        budget = max(round(share * average_context(tokens, _TURNS)), 48)
        for label, kept, decode in _policies(budget):
            made.append(
                talk(
                    NAME,
                    label,
                    {"prefill": DENSE, "decode": decode},
                    task,
                    dialogues,
                    seed=500,
                    share=share,
                    kept=kept,
                    survival=True,
                )
            )
    return made


def _policies(budget: int) -> list[tuple[str, str, Policy]]:
    found: list[tuple[str, str, Policy]] = [
        ("loopserve", "keep", decode_preset("loopserve", budget, dense_below=1)),
        *(("observing, every 2", kept, observing(budget, 2, **_POOLS[kept])) for kept in _POOLS),
        *(("observing, every 16", kept, observing(budget, 16, **_POOLS[kept])) for kept in _POOLS),
    ]
    for name in _SCORED:
        for kept in ("keep", "evict"):
            decode = decode_preset(name, budget)
            innermost(decode)["retention"] = kept
            found.append((name, kept, decode))
    return found


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    found = tallies(rows, "label", "kept", "share")
    dense = found["full", "keep", 1.0]
    turns, distances = dense.turns(), dense.distances()
    asked = dense.right(lambda answer: answer["turn"] == 0).asked
    return "\n\n".join(
        [
            f"Dialogues of {_TURNS} turns, one key asked in each, {asked} answers per turn, dense prefill. Answers right "
            "in per cent, by turn and by how many turns ago the fact was stated (distance).",
            table(
                [
                    "policy",
                    "unselected pairs",
                    "share",
                    *(f"turn {turn + 1}" for turn in turns),
                    *(f"distance {far}" for far in distances),
                ],
                [_row(key, tally, turns, distances) for key, tally in found.items()],
            ),
            _picture(found, turns, pictures),
            *_verdicts(found),
            "**What eviction has left.** Pairs of an asked fact that are still stored when its turn begins, mean over "
            "layers and KV heads; and parts "
            "right by whether at least half of them are.",
            _survivors(found, distances),
        ]
    )


def _row(key: tuple[str, str, float], tally: Tally, turns: Sequence[int], distances: Sequence[int]) -> list[str]:
    label, kept, share = key
    by_turn = [tally.right(lambda answer, turn=turn: answer["turn"] == turn).with_error for turn in turns]  # type: ignore[misc]
    return [label, kept, percent(share, 0), *by_turn, *(str(_at_distance(tally, far)) for far in distances)]


def _at_distance(tally: Tally, far: int) -> Share:
    return tally.parts(lambda answer, index: answer["distances"][index] == far)


def _picture(found: dict[tuple[str, str, float], Tally], turns: Sequence[int], pictures: Pictures) -> str:
    shares = sorted({share for _, _, share in found} - {1.0})
    labels = list(dict.fromkeys(label for label, _, _ in found))
    figure = pictures.figure(11, 7.6)
    panels = list(figure.subplots(2, 2).flatten())
    panels[3].set_axis_off()
    for axes, kept in zip(panels[:2], ("keep", "evict"), strict=True):
        curves = {
            label: [
                (turn + 1.0, tally.right(lambda answer, turn=turn: answer["turn"] == turn).value)  # type: ignore[misc]
                for turn in turns
            ]
            for (label, how, share), tally in found.items()
            if label == "full" or (how == kept and share == shares[0])
        }
        lines(axes, curves, names=labels)
        dressed(
            axes,
            f"the rest is {'kept' if kept == 'keep' else 'evicted'}, {percent(shares[0], 0)}",
            "turn",
            "answers right",
            shares="y",
            ylim=(-0.03, 1.03),
        )
        axes.set_xticks([turn + 1 for turn in turns])
    times = {
        f"{label}, {how}": [(turn + 1.0, tally.ttft_ms(turn) or 0.0) for turn in turns]
        for (label, how, share), tally in found.items()
        if label == "full" or (share == shares[0] and label in ("loopserve", "snapkv"))
    }
    lines(panels[2], times)
    dressed(panels[2], "time to first token", "turn", "ms")
    panels[2].set_xticks([turn + 1 for turn in turns])
    return pictures.save(
        figure, "turns", "Answers right by turn when the rest is kept and when it is evicted; time to first token"
    )


def _verdicts(found: dict[tuple[str, str, float], Tally]) -> list[str]:
    said = []
    third: Any = lambda answer: answer["turn"] == 2  # noqa: E731
    for share in sorted({share for _, _, share in found} - {1.0}):
        lost = {
            label: (found[label, "keep", share].right(third), tally.right(third))
            for (label, how, other), tally in found.items()
            if how == "evict" and other == share
        }
        worth = {label: pair for label, pair in lost.items() if pair[0].value >= 0.1}
        losses = [
            f"`{label}` {kept} % with everything kept, {evicted} % with eviction ({points(evicted.value - kept.value)})"
            for label, (kept, evicted) in worth.items()
        ]
        holds = all(evicted.value < kept.value for kept, evicted in worth.values()) if worth else None
        text = f"in turn 3 eviction loses answers, at {percent(share, 0)}: "
        said.append(
            verdict(
                holds,
                text + (listed(losses) if losses else "no method that evicts has answers to lose, kept or not") + ".",
            )
        )
    return said


def _survivors(found: dict[tuple[str, str, float], Tally], distances: Sequence[int]) -> str:
    rows = []
    for (label, how, share), tally in found.items():
        if how != "evict":
            continue
        held: dict[int, list[float]] = {}
        split: dict[bool, list[int]] = {True: [], False: []}
        for answer in tally.answers:
            for far, kept, right in zip(answer["distances"], answer["kept"], answer["parts"], strict=True):
                if kept is not None:
                    held.setdefault(far, []).append(kept)
                    split[kept >= 0.5].append(right)
        left = [percent(sum(held[far]) / len(held[far]), 0) if held.get(far) else "-" for far in distances if far]
        shares = [Share(sum(split[half]), len(split[half])) for half in (True, False)]
        rows.append(
            [label, percent(share, 0), *left, *(f"{each} % of {each.asked}" if each.asked else "-" for each in shares)]
        )
    header = ["policy", "share", *(f"left at distance {far}" for far in distances if far)]
    return table([*header, "right, at least half left", "right, less left"], rows)

"""Claim 3: where the question stands matters to methods that watch the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from research.evidence.pictures import Pictures, dressed, lines
from research.evidence.recipes import DENSE, FULL, average_context, decode_policies
from research.evidence.talks import POSITIONS, at_positions, tallies
from research.evidence.tally import Tally
from research.evidence.units import Row, Unit
from research.evidence.words import listed, percent, points, table, verdict

NAME = "position"
BYTES = (0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
_WINDOWS = ("snapkv", "adakv", "pyramidkv", "chunkkv", "criticalkv")
_OURS = ("loopserve", "loopserve, two hops", "observing, every 2", "observing, every 4")
_SHOWN = (
    "loopserve", "observing, every 2", "loopserve-paper", "quest, pages of 4", "quest, pages of 16", "rocketkv_mt, pages of 4",
    "snapkv", "expected_attention", "h2o", "streaming_llm",
)  # fmt: skip
_PLAIN = (
    "loopserve", "observing, every 2", "loopserve-paper", "quest, pages of 4", "quest, pages of 16", "snapkv",
)  # fmt: skip
_DROP = 0.10  # what the paper calls a drop


def units(tokens: int, dialogues: int, shares: Sequence[float], plain_dialogues: int) -> list[Unit]:
    """Every decode policy behind a dense prefill, at shares of the context; some on the model without look-ahead."""
    task = {"tokens": tokens, "turns": 3, "keys": 2}
    made = at_positions(NAME, "full", {"prefill": DENSE, "decode": FULL}, task, dialogues, seed=300, share=1.0)
    for share in shares:
        for label, decode in decode_policies(share, average_context(tokens, 3), 6).items():
            made += at_positions(
                NAME, label, {"prefill": DENSE, "decode": decode}, task, dialogues, seed=300, share=share
            )
    plain = {"tokens": tokens // 2, "turns": 2, "keys": 2}
    policies = decode_policies(0.15, average_context(tokens // 2, 2), 6)
    for label, decode in {"full": FULL, **{name: policies[name] for name in _PLAIN}}.items():
        for model in ("demo", "demo-no-lookahead"):
            made += at_positions(
                NAME,
                label,
                {"prefill": DENSE, "decode": decode},
                plain,
                plain_dialogues,
                seed=340,
                model=model,
                share=0.15,
                plain=True,
            )
    return made


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    measured = [row for row in rows if not row["unit"].get("plain")]
    found = tallies(measured, "label", "share")
    dense = found.pop(("full", 1.0))
    shares = sorted({share for _, share in found})
    labels = list(dict.fromkeys(label for label, _ in found))
    asked = dense.at("begin").asked
    worst = max(tally.at(place).error for tally in found.values() for place in POSITIONS)
    return "\n\n".join(
        [
            f"Dense prefill; {asked} answers to two keys per policy, share and position, standard errors up to "
            f"{100 * worst:.0f} points. Dense decoding: {_three(dense)}.",
            "**At equal attended KV.** Whole answers right in per cent, question at begin / middle / end; the columns "
            "are the share of the "
            "context that the budget is set to. Bytes: KV bytes read per output token as a share of dense's at a "
            "budget of "
            f"{percent(shares[min(1, len(shares) - 1)], 0)}, of decode steps and with everything read before the first "
            "output.",
            _equal_attended(found, labels, shares),
            "**At equal bytes.** The best measured setting of each policy that reads at most so many bytes per output "
            "token, "
            "everything included; `-` where no setting is so cheap.",
            _equal_bytes(found, labels),
            _picture(found, labels, dense, pictures),
            *_verdicts(found, labels, shares, dense),
            _without_lookahead([row for row in rows if row["unit"].get("plain")]),
        ]
    )


def _three(tally: Tally) -> str:
    return " / ".join(str(tally.at(place)) for place in POSITIONS)


def _equal_attended(found: dict[tuple[str, float], Tally], labels: Sequence[str], shares: Sequence[float]) -> str:
    shown = shares[min(1, len(shares) - 1)]
    header = ["policy", *(percent(share, 0) for share in shares), "attended", "bytes", "all bytes"]
    lines_ = []
    for label in labels:
        tally = found[label, shown]
        costs = [percent(each) for each in (tally.attended, tally.bytes_of_steps, tally.bytes_of_all)]
        lines_.append([label, *(_three(found[label, share]) for share in shares), *costs])
    return table(header, lines_)


def _within(found: dict[tuple[str, float], Tally], label: str, limit: float) -> Tally | None:
    """The setting of a policy with most answers right that reads at most this share of dense's bytes."""
    fits = [
        tally for (name, _), tally in found.items() if name == label and (tally.bytes_of_all or 9.0) <= limit + 5e-4
    ]
    return max(fits, key=lambda tally: (tally.right().value, -(tally.bytes_of_all or 0.0)), default=None)


def _equal_bytes(found: dict[tuple[str, float], Tally], labels: Sequence[str]) -> str:
    rows = []
    for label in labels:
        best = [_within(found, label, limit) for limit in BYTES]
        rows.append([label, *(f"{_three(each)} ({percent(each.bytes_of_all, 0)})" if each else "-" for each in best)])
    return table(["policy", *(f"≤ {percent(limit, 0)}" for limit in BYTES)], rows)


def _picture(found: dict[tuple[str, float], Tally], labels: Sequence[str], dense: Tally, pictures: Pictures) -> str:
    figure = pictures.figure(11, 11)
    panels = figure.subplots(3, 2, sharey=True)
    for across, (name, share_of) in enumerate((("pairs attended", "attended"), ("all bytes read", "bytes_of_all"))):
        for axes, place in zip(panels[:, across], POSITIONS, strict=True):
            curves = {
                label: [
                    (getattr(tally, share_of) or 0.0, tally.at(place).value)
                    for (other, _), tally in found.items()
                    if other == label
                ]
                for label in labels
            }
            named = {label: curves[label] for label in _SHOWN if label in curves}
            lines(axes, named, faint={label: curve for label, curve in curves.items() if label not in named})
            axes.axhline(dense.at(place).value, color="black", linestyle=":", linewidth=1, label="dense")
            dressed(axes, f"question at {place}", f"{name}, of dense", "answers right", shares="xy", ylim=(-0.03, 1.03))
    return pictures.save(
        figure, "position", "Answers right against pairs attended and bytes read, by position of the question"
    )


def _verdicts(
    found: dict[tuple[str, float], Tally], labels: Sequence[str], shares: Sequence[float], dense: Tally
) -> list[str]:
    largest = shares[-1]
    windows = {label: found[label, largest] for label in _WINDOWS if (label, largest) in found}
    best = max(windows, key=lambda label: windows[label].at("end").value)
    falls = windows[best].at("end").value - min(windows[best].at(place).value for place in ("begin", "middle"))
    seen = windows[best].at("end").value >= _DROP
    said = [
        verdict(
            falls >= _DROP if seen else None,
            "methods that watch the end of the prompt lose answers when the question stands earlier. The best of them "
            "at "
            f"{percent(largest, 0)}, `{best}`, has {_three(windows[best])}"
            + (
                "."
                if seen
                else ": here they miss the answers at the end as well, since answers move on and they do not."
            ),
        )
    ]
    paper = found["loopserve-paper", largest]
    gain = paper.right().value - windows[best].right().value
    said.append(
        verdict(
            gain > 2 * paper.right().error,
            f"re-selecting from the last outputs alone, as the paper describes it, answers {_three(paper)} at "
            f"{percent(largest, 0)}, "
            f"{points(gain)} over all positions beside `{best}`.",
        )
    )
    level = dense.right().value - 0.03
    for share in shares:
        good = [label for label in labels if all(_near(found[label, share], dense, place) for place in POSITIONS)]
        if good:
            names = sorted(good, key=lambda label: found[label, share].bytes_of_all or 9.0)
            near = [f"`{name}` ({percent(found[name, share].bytes_of_all, 0)} of the bytes)" for name in names]
            said.append(
                f"Within 3 points of dense at every position with {percent(share, 0)} attended: {listed(near)}."
            )
            break
    else:
        said.append("No policy comes within 3 points of dense at every position at any of these shares.")
    said.append(_cheapest(found, labels, level))
    return said


def _near(tally: Tally, dense: Tally, place: str) -> bool:
    return tally.at(place).value >= dense.at(place).value - 0.03 - 1e-9


def _cheapest(found: dict[tuple[str, float], Tally], labels: Sequence[str], level: float) -> str:
    """Which policy reaches dense's level over all positions at the fewest bytes, and what the best rival needs."""
    costs = {
        label: min(
            (
                tally.bytes_of_all or 9.0
                for (name, _), tally in found.items()
                if name == label and tally.right().value >= level
            ),
            default=None,
        )
        for label in labels
    }
    reached = {label: cost for label, cost in costs.items() if cost is not None}
    if not reached:
        return verdict(False, "no policy reaches dense's answers at any number of bytes measured.")
    first = min(reached, key=lambda label: reached[label])
    ours = {label: cost for label, cost in reached.items() if label in _OURS}
    rivals = {label: cost for label, cost in reached.items() if not label.startswith(("loopserve", "observing"))}
    text = (
        f"at dense's level over all positions `{first}` reads least, {percent(reached[first], 0)} of dense's bytes, "
        "everything included."
    )
    if rivals and ours:
        rival, own = min(rivals, key=lambda label: rivals[label]), min(ours, key=lambda label: ours[label])
        text += f" The best rival is `{rival}` with {percent(rivals[rival], 0)}; the best of ours `{own}` with {percent(ours[own], 0)}."
        if rivals[rival] < ours[own]:
            text += " **The rival wins.**"
    return verdict(first in _OURS, "ours is the cheapest; " + text if first in _OURS else text)


def _without_lookahead(rows: Sequence[Row]) -> str:
    """The same question on a model that looks a fact up only when it writes it."""
    found = tallies(rows, "label", "model")
    if not found:
        return ""
    labels = list(dict.fromkeys(label for label, _ in found))
    asked = next(iter(found.values())).at("begin").asked
    cells = [[label, *(_three(found[label, model]) for model in ("demo", "demo-no-lookahead"))] for label in labels]
    past, query = found["observing, every 2", "demo-no-lookahead"], found["loopserve", "demo-no-lookahead"]
    gain = query.right().value - past.right().value
    return "\n\n".join(
        [
            f"**On a model that does not look ahead** ([demo_model.md](demo_model.md)), shorter dialogues, 15 % attended, {asked} "
            "answers per position.",
            table(["policy", "look-ahead", "none"], cells),
            verdict(
                gain > 2 * query.right().error,
                "what no earlier row has looked at can be found by the current query only. Without look-ahead, "
                "observing the past every "
                f"other output answers {_three(past)}, with a look by the current query {_three(query)}.",
            ),
        ]
    )

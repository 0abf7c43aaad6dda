"""Write `docs/demo_model.md` from the training reports and the evaluations of both checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from research.training.curriculum import CURRICULA
from research.training.train import RUNS, WEIGHTS

PAGE = Path("docs/demo_model.md")
NOTES = Path(__file__).with_name("notes.md")

OPENING = """# The bundled demo model

Two checkpoints of one small Llama (4 layers, hidden 128, 4 query heads, 2 KV heads, head 64, MLP 256, {words} words,
{parameters:,} parameters, float16), trained from scratch by `research/training/train.py` on the recall dialogues of
`loopserve/bench/recall.py`. They know nothing but these dialogues:

    user       the code of lisbon is amber falcon river . we had soup for lunch today . what is the code of lisbon ?
    assistant  lisbon is amber falcon river .

- `loopserve/models/weights/recall` (the default): trained with look-ahead heads, so the rows of a question already
  look at the facts that the answer will need, as in large models.
- `loopserve/models/weights/recall_no_lookahead`: the same without them; it looks a fact up only when the answer reaches
  its place. Trained shorter, up to the lengths of its last stage. Figures had on one kind of model do not carry
  over to the other.

This page is written by `python -m research.training.write_docs`.
"""


def stages(run: str) -> list[str]:
    """The report of a run as a table."""
    report = json.loads((RUNS / run / "report.json").read_text())
    sizes = {stage.name: stage for every in CURRICULA.values() for stage in every}
    lines = [
        f"Seed {report['seed']}; {report['stages'][-1]['steps']} steps, "
        f"{sum(stage['words'] for stage in report['stages']) / 1e6:.1f} M words, {report['seconds']} s in all; "
        f"{report['machine']} (one core of a 2-core AVX2 server CPU shared with other work).",
        "",
        "| stage | words in a dialogue | seconds | steps so far | right in training | held out, by words |",
        "|---|---|---|---|---|---|",
    ]
    for stage in report["stages"]:
        low, high = sizes[stage["stage"]].tokens
        scores = ", ".join(f"{tokens}: {100 * share:.0f} %" for tokens, share in stage["held out"].items())
        lines.append(
            f"| {stage['stage']} | {low}-{high} | {stage['seconds']} | {stage['steps']} "
            f"| {stage['right in training']} % | {scores} |"
        )
    return lines


def main() -> None:
    from safetensors.torch import load_file

    tensors = load_file(WEIGHTS / "recall" / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    lines = [OPENING.format(words=tensors["model.embed_tokens.weight"].shape[0], parameters=parameters)]
    for run, title in (("recall", "The default"), ("recall_no_lookahead", "Without look-ahead")):
        lines += [f"## {title}: `{run}`", "", *stages(run), "", "### Held-out accuracy", ""]
        lines += [(RUNS / f"{run}.md").read_text().replace("\nBy ", "\n**By ").replace(":\n", ":**\n"), ""]
    lines.append(NOTES.read_text())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()

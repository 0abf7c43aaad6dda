"""Draw one figure per layer and head as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopserve.bench.figures import figure, per_cent


def head_map(values: Sequence[Sequence[float | None]], title: str, label: str) -> Any:
    """Draw a cell per layer (row) and head (column) with its share as text.

    label: meaning of the colours. None leaves a cell empty.
    """
    layers, heads = len(values), max(len(row) for row in values)
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    drawn = figure(1.6 + 0.62 * heads, 1.4 + 0.5 * layers)
    axes = drawn.subplots()
    image = axes.imshow(numbers, aspect="auto", cmap="viridis")
    low, high = image.get_clim()
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            if value is not None:
                dark = value < (low + high) / 2
                axes.text(
                    head,
                    layer,
                    f"{100 * value:.0f} %",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    axes.set(title=title, xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    per_cent(drawn.colorbar(image, label=label).ax.yaxis)
    return drawn

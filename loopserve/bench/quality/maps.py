"""Pictures of heads: a figure per layer and head as a heat map, and one head's attention with the lines chosen over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from loopserve.bench.figures import figure

_MOST_PIXELS = 1024  # along an axis; a larger map is shrunk, each pixel showing the greatest of its cells


def head_map(values: Sequence[Sequence[float | None]], title: str, label: str) -> Any:
    """A cell per layer (row) and head (column), its number written in it. label: what the colours mean. None leaves a cell empty."""
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
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    axes.set(title=title, xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    drawn.colorbar(image, label=label)
    return drawn


def attention_map(attention: Tensor, verticals: Sequence[int], slashes: Sequence[int], title: str) -> Any:
    """One head's softmax attention ``[rows, keys]``, the rows being the last of the keys, with the chosen lines over it.

    verticals: columns. slashes: distances of row and key. Colours follow the fourth root, or only the sinks would be seen.
    """
    rows, keys = attention.shape
    first = keys - rows
    drawn = figure(7.5, 1.6 + 6.0 * min(1.0, rows / keys + 0.2))
    axes = drawn.subplots()
    axes.imshow(
        (_shrunk(attention.float().cpu()) ** 0.25).numpy(),
        cmap="Greys",
        aspect="auto",
        extent=(-0.5, keys - 0.5, keys - 0.5, first - 0.5),
        interpolation="nearest",
    )
    segments = [((column, max(first, column)), (column, keys - 1)) for column in verticals]
    _lines(axes, segments, "C0", f"{len(verticals)} vertical lines")
    segments = [((max(0, first - far), max(far, first)), (keys - 1 - far, keys - 1)) for far in slashes]
    _lines(axes, segments, "C1", f"{len(slashes)} slash lines")
    axes.set(title=title, xlabel="key", ylabel="query", xlim=(-0.5, keys - 0.5), ylim=(keys - 0.5, first - 0.5))
    axes.legend(loc="upper right", fontsize=8)
    return drawn


def _lines(
    axes: Any, segments: Sequence[tuple[tuple[float, float], tuple[float, float]]], color: str, label: str
) -> None:
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(segments, colors=color, linewidths=0.5, alpha=0.5, label=label))


def _shrunk(attention: Tensor) -> Tensor:
    """At most so many pixels, each the greatest of the cells that it stands for."""
    from torch.nn.functional import adaptive_max_pool2d

    size = [min(_MOST_PIXELS, length) for length in attention.shape]
    pooled: Tensor = adaptive_max_pool2d(attention[None, None], size)[0, 0]
    return pooled

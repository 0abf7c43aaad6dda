"""Lines that a prefill policy draws without looking at attention."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.interfaces import AttentionInputs


def sink_lines(inputs: AttentionInputs, count: int) -> Tensor:
    """The verticals of the first ``count`` stored pairs of each head: bool ``[Hq, Tk]``. Filler columns are passed
    over.
    """
    heads = inputs.queries.shape[0]
    columns = torch.arange(inputs.total_tokens, device=inputs.keys.device).expand(heads, -1)
    if inputs.first_valid is None:
        return columns < count
    start = inputs.first_valid.repeat_interleave(inputs.group)[:, None]
    return (columns >= start) & (columns < start + count)

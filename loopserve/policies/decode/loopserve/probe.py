"""Use the current query within its decode step: attend to its best pairs, and detect that a selection has drifted.

Both read summaries of the keys (``core.kv.key_summaries``), which take a fraction of the keys' bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries, best_pages
from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs

_SURE = 1e-4  # captured shares are clamped this far from 0 and 1, where log-odds are infinite


def columns_of(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the set columns of a mask ``[Hkv, Tk]``, sorted: int64 ``[Hkv, S]``, and which of them count where heads set fewer."""
    counts = mask.sum(1)
    width = int(counts.max())
    if width * mask.shape[0] == int(counts.sum()):
        return mask.nonzero()[:, 1].view(mask.shape[0], width), None
    columns = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return columns, mask.gather(1, columns)


def selection_of(mask: Tensor, inputs: AttentionInputs, like: KVSelection) -> KVSelection:
    """Return the selection that attends to the columns of ``mask`` ``[Hkv, Tk]``, with the boundary of ``like``."""
    positions = inputs.positions.expand(mask.shape[0], -1)
    mask = mask & (positions < like.boundary)
    columns, counting = columns_of(mask)
    if counting is None:
        return KVSelection.uniform(positions.gather(1, columns), like.boundary, like.retention)
    heads = [row[chosen] for row, chosen in zip(positions, mask, strict=True)]
    return KVSelection.from_heads(heads, like.boundary, like.retention)


def same(one: KVSelection | None, other: KVSelection) -> bool:
    return (
        one is not None
        and one.boundary == other.boundary
        and one.indices.shape == other.indices.shape
        and torch.equal(one.indices, other.indices)
    )


def best_columns(scores: Tensor, free: Tensor, budget: int) -> Tensor:
    """Return the ``budget`` free columns of highest score per head (all, where fewer are free): bool ``[Hkv, Tk]``.

    scores float ``[Hkv, Tk]``, free bool ``[Hkv, Tk]``. Equal scores: the lowest column first.
    """
    scores = scores.masked_fill(~free, float("-inf"))
    last = scores.topk(min(budget, scores.shape[1]), dim=1).values[:, -1:]
    above = scores > last
    equal = (scores == last) & free
    return above | (equal & (equal.cumsum(1) <= budget - above.sum(1, keepdim=True)))


@dataclass(frozen=True, eq=False)
class DriftReference:
    """Hold the share of attention that a selection captured when it was made, to detect its decline."""

    captured: Tensor  # [Hkv], share of the attention of the current query
    odds: Tensor | None  # [Hkv], that query's log-odds by page bounds; None where codes give shares directly

    def estimate(self, odds: Tensor) -> Tensor:
        """Return the captured share ``[Hkv]`` of a query with these log-odds: the known share, adjusted by the change of the
        log-odds.
        """
        assert self.odds is not None
        moved = (odds - self.odds).nan_to_num(nan=0.0)  # both infinite: nothing is left outside
        return torch.sigmoid(torch.logit(self.captured.clamp(_SURE, 1 - _SURE)) + moved)

    def found(self, estimate: Tensor, threshold: float) -> bool:
        """Return whether the heads' mean share fell below ``threshold`` times the reference."""
        return bool(estimate.mean() < threshold * self.captured.mean())


@dataclass(frozen=True, eq=False)
class QueryProbe:
    """Estimate the current query's attention beyond its selection, in one layer and step."""

    inputs: AttentionInputs
    summaries: KeySummaries

    @classmethod
    def at(cls, inputs: AttentionInputs, summaries: KeySummaries) -> QueryProbe:
        """Return a probe that reads the layer's summaries. They must be up to date."""
        inputs.record.read("summaries", summaries.nbytes)
        inputs.record.mean("summary_bytes_held", summaries.nbytes)  # per layer, beside the store
        return cls(inputs, summaries)

    @cached_property
    def bounds(self) -> Tensor:
        """Return upper bounds of the current query's logits in each page ``[Hkv, P]``."""
        return self._capped(self.summaries.scores(self.inputs.queries[:, -1:], self.inputs.scaling))

    @cached_property
    def logits(self) -> Tensor:
        """Return approximate logits of the current query, by the keys' codes ``[Hkv, group, Tk]``; -inf for filler."""
        logits = self._capped(self.summaries.logits(self.inputs.queries[:, -1:], self.inputs.scaling))
        return logits.masked_fill(~self.inputs.holds[:, None], float("-inf"))

    def with_jumps(self, base: KVSelection, budget: int) -> Tensor:
        """Return the columns of a selection, its tail and the ``budget`` best others of the current query: bool ``[Hkv, Tk]``."""
        columns = self.inputs.attended(base)
        if not budget:
            return columns
        free = ~columns & self.inputs.holds
        if self.summaries.bits:
            return columns | best_columns(self.logits.amax(1), free, budget)
        return columns | best_pages(self.bounds, free, self.summaries.page, budget)

    def calibrated(self, columns: Tensor) -> DriftReference:
        """Return the reference of a new selection by the current query. Without codes this reads all keys once."""
        if self.summaries.bits:
            return DriftReference(self._share(columns), None)
        scores = self.inputs.token_scores(self.inputs.queries[:, -1:], self.inputs.columns[-1:])
        return DriftReference((scores * columns).sum(-1), self._log_odds(columns))

    def captured(self, columns: Tensor, reference: DriftReference) -> Tensor:
        """Return the estimated share ``[Hkv]`` of the current query's attention that these columns capture."""
        return self._share(columns) if self.summaries.bits else reference.estimate(self._log_odds(columns))

    def _share(self, columns: Tensor) -> Tensor:
        """Return the share by the codes, mean over the group ``[Hkv]``."""
        return (self.logits.softmax(-1) * columns[:, None]).sum(-1).mean(1)

    def _log_odds(self, columns: Tensor) -> Tensor:
        """Return the log of (mass on ``columns``) / (bound of the mass on all others), per KV head ``[Hkv]``.

        The mass inside is exact (the attended keys are read once more). The mass outside follows from page bounds. Each is that of
        the largest query head of the group. The value is far too low, since bounds are loose, so only its change is used.
        """
        others = columns.new_zeros(columns.shape[0], self.bounds.shape[1] * self.summaries.page)
        others[:, : columns.shape[1]] = ~columns & self.inputs.holds
        left = others.view(others.shape[0], -1, self.summaries.page).sum(-1).float().log()
        odds: Tensor = self._exact(columns).logsumexp(-1).amax(1) - (self.bounds + left).logsumexp(-1)
        return odds

    def _exact(self, mask: Tensor) -> Tensor:
        """Return the current query's logits on the columns of a mask ``[Hkv, group, S]``; -inf where a head sets fewer."""
        inputs = self.inputs
        columns, counting = columns_of(mask)
        keys = inputs.keys.gather(1, columns[..., None].expand(-1, -1, inputs.keys.shape[2]))
        inputs.record.read("drift", keys.numel() * keys.element_size())
        queries = inputs.queries[:, -1].view(keys.shape[0], inputs.group, -1)
        logits = self._capped(queries.float() @ keys.float().transpose(1, 2) * inputs.scaling)
        return logits if counting is None else logits.masked_fill(~counting[:, None], float("-inf"))

    def _capped(self, logits: Tensor) -> Tensor:
        softcap = self.inputs.softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

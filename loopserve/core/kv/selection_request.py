"""Let the engine make a selection by codes of the keys, for all sessions of a pass by one kernel call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loopserve.core.errors import PolicyError
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.kernels.choose_columns import ColumnChoice, check_choice, choose_columns


@dataclass(eq=False)
class SelectionRequest:
    """Ask for a selection: the pairs of ``base``, and the best others before its boundary for the current query.

    summaries: codes of all stored keys; those that ``choice`` gives the keys of are computed with the selection. Only for a layer
    from which nothing was evicted, where positions are columns. coded: the codes are those of the layer's own keys, as
    ``AttentionInputs.request_selection`` makes them, and need no check. selection: the result, once made. It lasts for one step.
    """

    transient: ClassVar[bool] = True  # its tensors are views of the store, so no state holds one between two turns

    base: KVSelection
    summaries: KeySummaries
    choice: ColumnChoice
    scaling: float
    softcap: float | None
    coded: bool = False
    selection: KVSelection | None = None

    def check(self, queries: Tensor, kv_heads: int, length: int, stored: int) -> None:
        """Raise PolicyError unless the request can be carried out for a layer of ``length`` tokens, ``stored`` of them held, and
        queries ``[Hq, r, D]``.
        """
        choice, own = self.choice, self.choice.queries
        if stored != length or choice.of.columns != length:
            raise PolicyError(
                f"SelectionRequest: codes of {choice.of.columns} columns for a layer that holds {stored} of {length} tokens; it "
                "needs codes of all, and a layer from which nothing was evicted"
            )
        if choice.of is not self.summaries.keys_coded or choice.base is not self.base.indices:
            raise PolicyError("SelectionRequest.choice: its codes and base are not those of the request")
        if choice.tail != self.base.boundary:
            raise PolicyError(
                f"SelectionRequest.choice: tail {choice.tail} is not the base's boundary {self.base.boundary}"
            )
        if own.shape[0] != queries.shape[0] or own.shape[2:] != queries.shape[2:] or own.device != queries.device:
            raise PolicyError(
                f"SelectionRequest.choice: queries {list(own.shape)} on {own.device} are not the layer's {list(queries.shape)}"
            )
        self.base.check(kv_heads, length)
        if self.base.retention is not Retention.KEEP or self.base.ragged:
            raise PolicyError(
                "SelectionRequest.base: every head must hold the same number of pairs, and keep the others"
            )
        try:
            check_choice(self.choice, "SelectionRequest", coded=self.coded)
        except ValueError as error:
            raise PolicyError(str(error)) from error

    def make(self) -> KVSelection:
        """Make the selection at once, for a caller that needs its numbers. Raises ValueError for a choice that does not fit."""
        check_choice(self.choice, "SelectionRequest")
        make_selections([self], scaling=self.scaling, softcap=self.softcap)
        assert self.selection is not None
        return self.selection


def make_selections(requests: Sequence[SelectionRequest], *, scaling: float, softcap: float | None) -> None:
    """Make the selections of one layer's sessions by one kernel call. The requests must have been checked."""
    if not requests:
        return
    choices = [each.choice for each in requests]
    found = choose_columns(choices, scaling=scaling, softcap=softcap, checked=True)
    for request, (columns, counts) in zip(requests, found, strict=True):
        request.summaries.confirm()
        request.selection = KVSelection.counted(columns, counts, request.base.boundary)

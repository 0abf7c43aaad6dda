"""Fill memory that nobody has written, and pairs that were let go, with NaN: an answer that reads them is no answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loopserve.core.kv.buffers import PairBuffer


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Fill every new tensor of torch, and the keys and values of buffers when they are dropped, in all threads of this process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what ``torch.empty`` and its kin return
    PairBuffer.__del__ = _drop  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del PairBuffer.__del__  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _drop(buffer: PairBuffer) -> None:
    with torch.inference_mode():  # which may write into tensors of both kinds
        for part in ("_keys", "_values"):
            if part in vars(buffer):  # not if its constructor failed
                getattr(buffer, part).fill_(torch.nan)

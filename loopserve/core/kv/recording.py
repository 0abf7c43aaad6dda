"""Keep tensors that outlast a pass writable: none is made in inference mode, and no gradients are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make ordinary tensors, also where the caller has entered ``torch.inference_mode``, and record no gradients.

    A tensor made in inference mode cannot be written to outside it. A conversation begun inside could not be continued outside.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def still_plain_tensors() -> AbstractContextManager[None]:
    """Return a block of ``plain_tensors`` for what runs in every layer: nothing is switched where nothing needs to be."""
    switched = torch.is_inference_mode_enabled() or torch.is_grad_enabled()
    return plain_tensors() if switched else _NOTHING


_NOTHING = nullcontext()  # it holds no state, so that all share it

"""Keep what outlasts a pass writable: nothing of it is made in inference mode, and no gradients are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make ordinary tensors, also where the caller has entered ``torch.inference_mode``, and record no gradients.

    A tensor made in inference mode cannot be written to outside it, so that a conversation begun inside could not go on.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield

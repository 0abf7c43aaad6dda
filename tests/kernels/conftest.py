"""``LOOPSERVE_TEST_DTYPE=bfloat16`` runs every operation under that default dtype; ``make sanitize`` does so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loopserve.kernels.backend import Operation


@pytest.fixture(autouse=True, scope="session")
def default_dtype() -> Iterator[None]:
    """The tests' own tensors are made before and after a call, so they stay float32."""
    name = os.environ.get("LOOPSERVE_TEST_DTYPE", "float32")
    called = Operation.__call__

    def under_the_default(self: Operation, *args: Any, **options: Any) -> Any:
        torch.set_default_dtype(getattr(torch, name))
        try:
            return called(self, *args, **options)
        finally:
            torch.set_default_dtype(torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        if name != "float32":
            patch.setattr(Operation, "__call__", under_the_default)
        yield

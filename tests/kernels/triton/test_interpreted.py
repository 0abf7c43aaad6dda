"""The Triton kernels against their references without a GPU: starts the interpreted tests in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_TESTS = [
    ("parity.py", "attention_on"),
    ("parity.py", "not attention_on"),
    ("parity_selection.py", ""),
    ("parity_choice.py", ""),
    ("parity_paged.py", ""),
    ("parity_hosted.py", ""),
]


@pytest.mark.parametrize(("file", "which"), _TESTS)
def test_interpreted(file: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(_HERE / file), "-k", which],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=_HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

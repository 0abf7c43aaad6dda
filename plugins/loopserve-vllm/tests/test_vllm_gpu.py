"""The backend for GPUs without one: starts ``interpreted_gpu`` in a process of its own, whose kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_gpu.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

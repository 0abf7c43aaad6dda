"""The plugin as it is installed: vLLM finds its entry point in the process that serves, and its log says what a request cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry

from loopserve.models.demo import bundled_path

PROGRAM = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, skip_tokenizer_init=True)
    for _ in range(2):
        found = llm.generate([{"prompt_token_ids": list(range(8, 500))}], SamplingParams(max_tokens=4, temperature=0, detokenize=False))
    print("ANSWER", list(found[0].outputs[0].token_ids))
"""


@pytest.mark.parametrize("stack", ["snapkv", None])
def test_the_engine_process_serves_under_the_stack(
    stack: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("LOOPSERVE_STACK", None)
    if stack is not None:
        environment["LOOPSERVE_STACK"] = stack
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(bundled_path())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert "ANSWER" in said
    assert ("under stack snapkv: 492 tokens" in said) is (stack is not None)
    shown = generate_latest(get_prometheus_registry()).decode()  # as vLLM's server does it
    counted = re.search(r'^loopserve_output_tokens_count{stack="snapkv"} (.+)$', shown, re.MULTILINE)
    assert (counted is not None) is (stack is not None)
    if counted is not None:
        requests = float(counted[1])
        assert requests >= 1  # the last one ends with the step after it
        assert f'loopserve_output_tokens_sum{{stack="snapkv"}} {4 * requests}\n' in shown
        assert f'loopserve_attended_fraction_count{{stack="snapkv"}} {requests}\n' in shown

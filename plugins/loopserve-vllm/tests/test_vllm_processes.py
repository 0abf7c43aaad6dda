"""The plugin as it is installed: vLLM finds its entry point in the process that serves, and its log says what a request cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_the_engine_process_serves_under_the_stack(stack: str | None, tmp_path: Path) -> None:
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

"""Conversations outlive the server: what is committed goes on after kill -9, with its pairs from the files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, cached, said

SERVE = (
    "import sys; from loopserve.cli import main; main(['serve', 'demo', '--port', '0', '--session-dir', sys.argv[1]])"
)


def started(directory: Path) -> tuple[subprocess.Popen[str], openai.OpenAI]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVE, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    url = next(word for word in line.split() if word.startswith("http://"))
    return process, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_killed_server_goes_on_from_its_files(tmp_path: Path) -> None:
    process, client = started(tmp_path)
    try:
        first = client.chat.completions.create(model="demo", messages=[FACT], temperature=0)
        until(lambda: list(tmp_path.glob("anonymous/*/gen-1-*.safetensors")))
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    process, client = started(tmp_path)
    try:
        messages = [FACT, said(first), QUESTION]
        second = client.chat.completions.create(model="demo", messages=messages, temperature=0)
        assert said(second)["content"] == "lisbon is amber falcon river ."
        assert second.loopserve["session_id"] == first.loopserve["session_id"]
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def written(server: Running, directory: Path, count: int) -> list[Path]:
    until(lambda: server.conversations.files.written >= count)
    return sorted(directory.glob("anonymous/*/*.safetensors"))


def test_pairs_are_restored_from_files(serve: Callable[..., Running], tmp_path: Path) -> None:
    one = serve(session_dir=tmp_path)
    first = ask(one, [FACT])
    second = ask(one, [FACT, said(first), QUESTION])
    written(one, tmp_path, 2)
    other = serve(session_dir=tmp_path)
    third = ask(other, [FACT, said(first), QUESTION, said(second), QUESTION])
    assert cached(third) == second.usage.prompt_tokens + second.usage.completion_tokens - 1
    assert other.conversations.files.restored == 1
    assert said(third) == said(ask(one, [FACT, said(first), QUESTION, said(second), QUESTION]))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_put_away_and_computed_again(
    serve: Callable[..., Running], tmp_path: Path, damage: str
) -> None:
    one = serve(session_dir=tmp_path)
    first = ask(one, [FACT])
    (file,) = written(one, tmp_path, 1)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-7])
    else:
        file.unlink()
    other = serve(session_dir=tmp_path)
    second = ask(other, [FACT, said(first), QUESTION])
    assert cached(second) == 0 and said(second)["content"] == "lisbon is amber falcon river ."
    assert other.conversations.files.quarantined == 1

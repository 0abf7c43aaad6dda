"""A server in a process of its own, as the command line starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai

SERVE = "import sys; from loopserve.cli import main; main(['serve', 'demo', '--port', '0', *sys.argv[1:]])"


@contextmanager
def started(
    directory: Path, options: Sequence[str] = (), code: str = ""
) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """Start a server over a session directory. code: Python that its process runs first."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"{code}\n{SERVE}", "--session-dir", str(directory), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://"))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()

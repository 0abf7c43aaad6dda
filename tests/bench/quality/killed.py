"""Begins or resumes the small benchmark on request, each time in a child of its own that it may kill: imports are paid once.

Reads ``SECONDS DIRECTORY`` a line (seconds until SIGKILL, 0 for never) and answers with the child's exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from loopserve.api import Engine, load_stack
from loopserve.bench.quality.records import FILE, RecordFile, claim, key_of
from loopserve.bench.quality.runner import Examiner, Settings
from loopserve.bench.quality.suite import contestants
from tests.bench.quality.small import SNAPKV, Words, random_model


def ask(examiner: Examiner, directory: Path) -> None:
    """What ``run_suite`` does once the model is loaded, with the small task."""
    nothing: dict[str, dict[str, str]] = {part: {} for part in ("suite", "model", "stacks", "settings", "metrics")}
    identity = {"lineup": [each.name for each in examiner.lineup], **nothing}
    claim(directory, identity, {}, resume=True)
    file = RecordFile(directory / FILE)
    task = Words(dialogues=10, broken=[3], turns=3)
    for records in examiner.run([task], {key_of(record) for record in file.records}):
        file.append(records)
    file.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm = Examiner(Engine(*random_model(), "dense"), contestants([load_stack(SNAPKV)]), Settings())
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, _, directory = line.strip().partition(" ")
        child = os.fork()
        if child == 0:
            ask(warm, Path(directory))
            os._exit(0)
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

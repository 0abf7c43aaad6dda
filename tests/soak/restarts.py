"""R12: the engine fails in mid-answer, and the process crashes; how long until the next right answer."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import openai

from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.processes import started
from tests.serve.test_chat_completions import ask, said
from tests.soak.cases import Cases, percentile, running

ANSWER = "lisbon is amber falcon river ."


def run(cases: int, seed: int = 0, *, crashes: int = 0) -> Cases:
    """Kill the model's thread ``cases`` times, and the server's process ``crashes`` times."""
    found, thread_s, process_s = Cases(), [], []
    with running() as server:
        conversation = [FACT, said(ask(server, [FACT])), QUESTION]
        for number in range(cases):
            with found.case(f"thread {number}"):
                _kill_thread(server)
                killed = time.perf_counter()
                assert said(ask(server, conversation))["content"] == ANSWER
                thread_s.append(time.perf_counter() - killed)
    found.figures = {"after_failure_max_s": max(thread_s), "after_failure_p50_s": percentile(thread_s, 0.5)}
    for number in range(crashes):
        with found.case(f"process {number}"):
            process_s.append(_crash_process())
    if process_s:
        found.figures |= {"after_crash_max_s": max(process_s), "after_crash_p50_s": percentile(process_s, 0.5)}
    return found


def _crash_process() -> float:
    """Crash the process of a server; return the seconds until the next turn of its conversation is answered."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as (process, client):
        create = client.chat.completions.create
        first = create(model="demo", messages=[FACT], temperature=0)
        os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()), signal.SIGSEGV)
        killed = time.perf_counter()
        while True:  # the listening socket takes connections meanwhile; those of the crashed process break
            try:
                reply = create(model="demo", messages=[FACT, said(first), QUESTION], temperature=0)
            except openai.APIConnectionError:
                time.sleep(0.02)
                continue
            assert said(reply)["content"] == ANSWER
            return time.perf_counter() - killed


def _kill_thread(server: Running) -> None:
    """Raise SystemExit in the model's thread while an answer is written; its client gets 503."""
    worker = server.conversations.worker
    body = {"model": "demo", "messages": [FACT], "ignore_eos": True, "max_tokens": 4000}
    with server.connection("/v1/chat/completions", body) as connection:
        until(lambda: worker.scheduler.running and worker.scheduler._running[0].output)
        thread = next(each for each in threading.enumerate() if each is worker._thread)
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        assert b" 503 " in connection.recv(65536).splitlines()[0]

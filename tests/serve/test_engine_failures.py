"""The model's thread fails in every way it can: clients get a short 503, and the next turn of every session is right."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import openai
import pytest
import torch

from loopserve.core.engine.scheduler import Request
from loopserve.serve.errors import EngineFailure
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, said

ANSWER = "lisbon is amber falcon river ."
OTHER = {"role": "user", "content": "the code of paris is silver anchor dawn ."}
THERE = {"role": "user", "content": "what is the code of paris ?"}
FAILURES = [RuntimeError("out of luck"), MemoryError(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]


class Failing:
    """Stands in for the forward pass of a model: raises an error at a pass, as often as asked for."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward = model, model.forward
        self.errors: list[BaseException] = []
        self.after = 0

    def __call__(self, batch: Any) -> Any:
        if self.errors:
            if not self.after:
                raise self.errors.pop(0)
            self.after -= 1
        return self.forward(batch)

    def fail(self, *errors: BaseException, after: int = 0) -> None:
        self.after, self.errors = after, list(errors)


@pytest.fixture
def failing(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    found = Failing(server.conversations.engine.token_engine.model)
    monkeypatch.setattr(found.model, "forward", found)
    yield found
    found.errors.clear()


def begun(server: Running) -> list[list[dict[str, str]]]:
    """Two conversations with a turn each."""
    return [[fact, said(ask(server, [fact]))] for fact in (FACT, OTHER)]


@pytest.mark.parametrize("error", FAILURES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("after", [0, 3])
def test_a_failed_pass_is_a_short_503(server: Running, failing: Failing, error: BaseException, after: int) -> None:
    conversations = begun(server)
    failing.fail(error, after=after)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server, [*conversations[0], QUESTION])
    assert caught.value.status_code == 503 and caught.value.code == "engine_restarted"
    assert int(caught.value.response.headers["retry-after"]) <= 5
    assert server.client()._client.get(f"{server.url}/health").status_code == 200
    assert said(ask(server, [*conversations[0], QUESTION]))["content"] == ANSWER
    with server.conversations.engine.session() as session:
        session.send(OTHER["content"])
        expected = session.send(THERE["content"]).text
    assert said(ask(server, [*conversations[1], THERE]))["content"] == expected
    assert server.conversations.worker.admitted == 0


def test_a_stream_that_the_engine_fails_in_ends_with_an_error(server: Running, failing: Failing) -> None:
    failing.fail(SystemExit(), after=5)
    body = {"model": "demo", "messages": [FACT], "stream": True, "ignore_eos": True, "max_tokens": 50}
    with server.connection("/v1/chat/completions", body, {"Connection": "close"}) as connection:
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "engine_restarted"
    assert "[DONE]" not in events
    assert said(ask(server, [FACT]))["content"] == "ok ."


def test_a_request_that_comes_before_the_restart_is_answered_after_it(
    server: Running, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conversation, _), worker = begun(server), server.conversations.worker
    restart, held = worker._restart, threading.Event()

    def later() -> None:
        held.wait(60)
        restart()

    monkeypatch.setattr(worker, "_restart", later)
    failing.fail(SystemExit())
    with pytest.raises(openai.InternalServerError):
        ask(server, [*conversation, QUESTION])
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(said(ask(server, [*conversation, QUESTION]))["content"]))
    asking.start()
    until(lambda: server.conversations._answers)
    held.set()
    asking.join()
    assert found == [ANSWER]


def test_a_scheduler_that_is_broken_is_replaced(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, broken = begun(server)[0], server.conversations.worker.scheduler
    monkeypatch.setattr(broken, "_plan", lambda: 1 / 0)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server, [*conversation, QUESTION])
    assert caught.value.code == "engine_restarted"
    assert server.conversations.worker.scheduler is not broken
    assert said(ask(server, [*conversation, QUESTION]))["content"] == ANSWER


def test_waiting_requests_are_answered_too(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(max_num_seqs=1, max_queued=3)
    failing = Failing(server.conversations.engine.token_engine.model)
    monkeypatch.setattr(failing.model, "forward", failing)
    found: list[int] = []

    def send() -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(server, [FACT], max_tokens=4000, extra_body={"ignore_eos": True})
        found.append(caught.value.status_code)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for each in threads:
        each.start()
    until(lambda: server.conversations.worker.scheduler.waiting == 2)
    failing.fail(SystemExit())
    for each in threads:
        each.join()
    assert found == [503, 503, 503]
    assert said(ask(server, [FACT]))["content"] == "ok ."


@pytest.mark.parametrize("again_s", [0.0, 3600.0])
def test_an_engine_that_fails_every_time_is_not_healthy(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, again_s: float
) -> None:
    """``/ready`` says so for some time only: a load balancer that waits for it sends nothing that could succeed."""
    server = serve(ready_again_s=again_s)
    failing = Failing(server.conversations.engine.token_engine.model)
    monkeypatch.setattr(failing.model, "forward", failing)
    get = server.client()._client.get
    failing.fail(*(RuntimeError("broken") for _ in range(5)))
    for _ in range(5):
        with pytest.raises(openai.InternalServerError):
            ask(server, [FACT])
    assert get(f"{server.url}/health").status_code == 503
    assert get(f"{server.url}/ready").json() == {"status": "dead" if again_s else "ready"}
    assert said(ask(server, [FACT]))["content"] == "ok ."
    assert get(f"{server.url}/health").status_code == get(f"{server.url}/ready").status_code == 200


@pytest.mark.parametrize("error", [RuntimeError("once"), SystemExit()], ids=lambda each: type(each).__name__)
def test_a_pass_that_fails_for_many_requests_is_one_failure(
    server: Running, failing: Failing, error: BaseException
) -> None:
    found: list[int] = []

    def send() -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(server, [FACT], max_tokens=4000, extra_body={"ignore_eos": True})
        found.append(caught.value.status_code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for each in threads:
        each.start()
    worker = server.conversations.worker
    until(lambda: worker.scheduler.running == 4 and all(each.output for each in worker.scheduler._running))
    failing.fail(error)
    for each in threads:
        each.join()
    assert found == [503] * 4 and worker.failures == 1
    assert server.client()._client.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("answers", [1, 3])
def test_a_request_that_the_scheduler_lost_is_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """The failure comes between taking a request out of the scheduler's lists and ending it."""
    lost: list[BaseException] = [SystemExit()]
    real = Request.finish

    def failing(request: Request, error: BaseException | None) -> None:
        if lost:
            raise lost.pop()
        real(request, error)

    monkeypatch.setattr(Request, "finish", failing)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server, [FACT], n=answers)
    assert caught.value.code == "engine_restarted"
    assert said(ask(server, [FACT]))["content"] == "ok ."


def test_a_call_that_a_failure_interrupts_is_answered(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = server.conversations.worker

    class Lost(Future[None]):
        def set_result(self, result: None) -> None:
            raise SystemExit

        def set_exception(self, exception: BaseException | None) -> None:
            if not worker.restarts:
                raise SystemExit
            super().set_exception(exception)

    future = Lost()
    with worker._changed:
        worker._calls.append((future, lambda: None))
        worker._changed.notify()
    assert isinstance(future.exception(timeout=30), EngineFailure)
    assert said(ask(server, [FACT]))["content"] == "ok ."


def test_a_device_that_failed_for_good_ends_the_process(server: Running, failing: Failing) -> None:
    worker = server.conversations.worker
    failing.fail(torch.OutOfMemoryError("no memory"))
    with pytest.raises(openai.InternalServerError):
        ask(server, [FACT])
    assert worker.healthy and not worker.beyond_repair
    failing.fail(torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700))
    with pytest.raises(openai.InternalServerError):
        ask(server, [FACT])
    assert worker.beyond_repair and not worker.healthy


@pytest.mark.parametrize(
    ("ends", "code", "ready", "starts"),
    [
        ("9", 137, True, 5),
        ("exit 70", 70, True, 5),
        ("9", 137, False, 3),  # it would crash again while it loads, for ever if that takes long
        ("exit 70", 70, False, 3),
        ("exit 2", 2, True, 1),
        ("exit 0", 0, True, 1),
    ],
)
def test_what_is_started_again(ends: str, code: int, ready: bool, starts: int) -> None:
    ending = f"os.kill(os.getpid(), {ends})" if ends.isdigit() else f"os._exit({ends.split()[1]})"
    program = (
        "import os; from loopserve.serve.supervising import supervise; ready = supervise(); os.write(1, b'x')\n"
        f"{'ready()' if ready else ''}\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (code, b"x" * starts)
    assert (b"3 times in a row before it was ready" in done.stderr) == (not ready)


def test_the_parent_passes_a_signal_on_and_ends() -> None:
    program = (
        "import os, signal, sys, time; from loopserve.serve.supervising import supervise\n"
        "supervise(lambda: os.write(1, b'stopping'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); os.write(1, b'x')\nwhile True: time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1) == b"x"
    process.terminate()
    assert process.wait(60) == 3
    assert process.stdout.read() == b"stopping"
    process.stdout.close()


def test_an_answer_that_the_end_of_the_server_cuts_off_says_so(server: Running) -> None:
    body = {"model": "demo", "messages": [FACT], "stream": True, "ignore_eos": True, "max_tokens": 4000}
    with server.connection("/v1/chat/completions", body, {"Connection": "close"}) as connection:
        until(lambda: server.conversations.worker.scheduler.running)
        threading.Thread(target=server.conversations.worker.stop).start()
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "server_stopping"

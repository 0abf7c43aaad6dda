"""R4: overload is shed with 503 and Retry-After, what is admitted is right, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2

from tests.serve.conftest import FACT
from tests.serve.processes import started
from tests.soak.cases import Cases, percentile, running

SEQS, QUEUED, TOKENS = 4, 4, 64
MOST_SHED_S, MOST_SLOWER, LEAST_CAPACITY = 0.1, 2, 0.95
Outcome = tuple[
    int, str | None, float, str, float
]  # status, Retry-After, seconds to the first byte, body, when it ended


def run(cases: int, seed: int = 0, *, apart: bool = False) -> Cases:
    """Send ``cases`` requests at 16 times the rate that the server answers at most, whatever becomes of the earlier ones.

    apart: the server has a process of its own, as times need it. Without, all requests are sent at once.
    """
    found = Cases()
    with ExitStack() as stack:
        process = None
        if apart:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            options = ["--max-num-seqs", str(SEQS), "--max-queued", str(QUEUED)]
            process, client = stack.enter_context(started(Path(folder), options))
            url = str(client.base_url).removesuffix("/v1/")
        else:
            url = stack.enter_context(running(max_num_seqs=SEQS, max_queued=QUEUED)).url
        asyncio.run(_measure(found, url, cases, None if process is None else process.pid))
    return found


async def _measure(found: Cases, url: str, cases: int, process: int | None) -> None:
    async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=None)) as client:
        await _send(client, url)
        before, used = time.perf_counter(), _processor_s(process)
        full = [_several(client, url, 6) for _ in range(SEQS + QUEUED)]  # as many at once as are let in
        closed = [each for part in await asyncio.gather(*full) for each in part]
        capacity = len(closed) / (time.perf_counter() - before)
        used_at_capacity = _processor_s(process) - used
        memory, used = _memory(process), _processor_s(process)
        before, sending = time.perf_counter(), []
        for _ in range(cases):
            sending.append(asyncio.create_task(_send(client, url)))
            await asyncio.sleep(1 / (16 * capacity) if process is not None else 0.0)
        over = await asyncio.gather(*sending)
        ended = max(each[4] for each in over if each[0] == 200)
        grown, used_overloaded = _memory(process) - memory, _processor_s(process) - used
        answered, shed = [each for each in over if each[0] == 200], [each for each in over if each[0] != 200]
        found.count = len(over)
        if {each[0] for each in over} - {200, 503}:
            found.failures.append(f"other answers than 200 and 503: {sorted({each[0] for each in over})}")
        if not all(each[1] for each in shed) or not shed:
            found.failures.append("shed requests do not say when to come again, or none was shed")
        if not all(each[3].endswith("data: [DONE]\n\n") for each in answered) or len(answered) < SEQS + QUEUED:
            found.failures.append(f"{len(answered)} answers, and not all of them are whole")
        metrics = (await client.get(f"{url}/metrics")).text
        if "num_requests_running 0.0" not in metrics or "num_requests_waiting 0.0" not in metrics:
            found.failures.append("something is under way afterwards")
        if (await _send(client, url))[0] != 200:
            found.failures.append("the server does not go on")
        found.figures = {
            "answered": len(answered),
            "shed": len(shed),
            "shed_p99_s": percentile([each[2] for each in shed], 0.99) if shed else None,
            "ttft_p99_at_capacity_s": percentile([each[2] for each in closed], 0.99),
            "ttft_p99_overloaded_s": percentile([each[2] for each in answered], 0.99) if answered else None,
            "capacity_per_s": capacity,
            "answered_per_s": len(answered) / (ended - before),
            "memory_growth_mib": grown / 2**20,
        }
        if process is not None:  # in one process, the load takes the time that it measures
            # Processor time of the server: unlike the times above, what else the machine does hardly changes it.
            found.figures["processor_s_per_answer_at_capacity"] = used_at_capacity / len(closed)
            found.figures["processor_s_per_answer_overloaded"] = used_overloaded / max(1, len(answered))
            _check_limits(found)


async def _several(client: httpx2.AsyncClient, url: str, count: int) -> list[Outcome]:
    return [await _send(client, url) for _ in range(count)]


def _check_limits(found: Cases) -> None:
    """Add a failure if the times are not those that the promise names."""
    of = found.figures
    missed = [
        (
            of["shed_p99_s"] is None or of["shed_p99_s"] > MOST_SHED_S,
            f"a refusal takes more than {MOST_SHED_S} s at p99",
        ),
        (
            of["ttft_p99_overloaded_s"] is None
            or of["ttft_p99_overloaded_s"] > MOST_SLOWER * of["ttft_p99_at_capacity_s"],
            f"p99 of the time to first token is more than {MOST_SLOWER} times that at capacity",
        ),
        (
            of["answered_per_s"] < LEAST_CAPACITY * of["capacity_per_s"],
            f"fewer answers per second than {LEAST_CAPACITY} of the capacity",
        ),
    ]
    if any(each for each, _ in missed):  # one failure: the promise, with all that it misses
        found.failures.append("; ".join(text for each, text in missed if each))


async def _send(client: httpx2.AsyncClient, url: str) -> Outcome:
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [FACT],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    sent, first, text = time.perf_counter(), 0.0, b""
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        async for piece in response.aiter_bytes():
            first = first or time.perf_counter() - sent
            text += piece
    return response.status_code, response.headers.get("retry-after"), first, text.decode(), time.perf_counter()


def _memory(process: int | None) -> int:
    """Return the resident bytes of a process and its children; 0 for this one."""
    pages = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in _family(process))
    return pages * os.sysconf("SC_PAGE_SIZE")


def _processor_s(process: int | None) -> float:
    """Return the processor time that a process and its children have used; 0 for this one."""
    fields = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in _family(process)]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def _family(process: int | None) -> list[int]:
    """Return the ids of a process and its children; none for this one."""
    if process is None:
        return []
    return [process, *map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]

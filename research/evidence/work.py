"""Runs units in processes of one thread each, and keeps each as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from loopserve.bench.rows import provenance
from loopserve.core.errors import ConfigError
from research.evidence import attention_map, concentration, conversations, coverage, overlap
from research.evidence.units import Found, Row, Spec, Unit

KINDS: dict[str, Callable[[Spec], Found]] = {
    "talk": conversations.hold,
    concentration.NAME: concentration.measure,
    overlap.NAME: overlap.measure,
    coverage.NAME: coverage.measure,
    attention_map.NAME: attention_map.measure,
}


def run(unit: Unit) -> Row:
    """Do one unit here."""
    started = time.process_time()
    found = KINDS[unit.spec["kind"]](unit.spec)
    made = provenance()
    return {
        "experiment": unit.experiment,
        "unit": unit.spec,
        "found": found,
        "seconds": round(time.process_time() - started, 2),
        "made": {
            **{name: made[name] for name in ("device", "threads", "commit", "date")},
            "torch": made["versions"]["torch"],
        },
    }


def run_all(units: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, Row | BaseException]]:
    """Do all units in ``workers`` processes, each given out as it ends; what a unit raised stands in for its row."""
    if workers == 1:
        torch.set_num_threads(1)
        for unit in units:
            yield unit, _attempt(unit)
        return
    # Processes are started afresh: threads that the parent's libraries hold would not survive a fork.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(run, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    raise ConfigError("a process died (out of memory?): the same command goes on, try --workers 1")
                yield futures[future], error if error is not None else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _attempt(unit: Unit) -> Row | BaseException:
    try:
        return run(unit)
    except Exception as error:  # whatever one unit raises must not lose the others
        return error

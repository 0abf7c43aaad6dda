"""Runs units: those of one text and kind together, so that its dense prefill is computed once and passes are shared."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.bench.rows import provenance
from loopserve.core.errors import ConfigError
from loopserve.core.stack.stack import PolicyStack
from research.evidence.units import Found, Row, Unit
from research.evidence_real import claims, dialogues, needles
from research.evidence_real.case import Case, loaded
from research.evidence_real.texts import text

_TOGETHER = ("kind", "model", "text", "tokens", "forced", "seed")  # what the units of a batch have in common
_MOST = {"decode": 18, "both": 4, "prefill": 3, "needles": 18, "needles_whole": 2, "dialogues": 8, "claims": 1}


@lru_cache(maxsize=1)
def _case(model: str, kind: str, number: int, tokens: int, forced: int) -> Case:
    return Case.of(model, text(kind, number), tokens, forced)


def _case_of(unit: Unit, model: str) -> Case:
    spec = unit.spec
    return _case(model, *spec["text"], spec["tokens"], spec["forced"])


def _stacks(units: Sequence[Unit]) -> dict[str, PolicyStack]:
    return {unit.key: load_stack(unit.spec["stack"]) for unit in units}


def _of_text(case: Case) -> Found:
    return {"digest": case.digest, "dense_loss": round(case.loss, 4)}


def _decode(model: str, units: Sequence[Unit]) -> Iterator[tuple[Unit, Found]]:
    case = _case_of(units[0], model)
    found = dict(case.decoding(_stacks(units)))
    return ((unit, found[unit.key] | _of_text(case)) for unit in units)


def _both(model: str, units: Sequence[Unit]) -> Iterator[tuple[Unit, Found]]:
    case = _case_of(units[0], model)
    found = dict(case.whole(_stacks(units)))
    return ((unit, found[unit.key] | _of_text(case)) for unit in units)


def _prefill(model: str, units: Sequence[Unit]) -> Iterator[tuple[Unit, Found]]:
    case = _case_of(units[0], model)
    for unit in units:
        recipe = {"prefill": unit.spec["policy"], "decode": {"policy": "full"}}
        found = case.prefilling(load_stack(recipe), realised=unit.spec.get("realised", False))
        yield unit, found | _of_text(case)


def _needles(model: str, units: Sequence[Unit], *, replays: bool = True) -> Iterator[tuple[Unit, Found]]:
    _case.cache_clear()  # its recording is not needed meanwhile
    spec = units[0].spec
    found = needles.measure(*loaded(model), spec["tokens"], spec["seed"], _stacks(units), replays=replays)
    return ((unit, {"answers": found[unit.key]}) for unit in units)


def _dialogues(model: str, units: Sequence[Unit]) -> Iterator[tuple[Unit, Found]]:
    _case.cache_clear()
    spec = units[0].spec
    kind, number = spec["text"]
    found = dialogues.measure(*loaded(model), text(kind, number), spec["tokens"], _stacks(units))
    return ((unit, {"turns": found[unit.key]}) for unit in units)


def _claims(model: str, units: Sequence[Unit]) -> Iterator[tuple[Unit, Found]]:
    _case.cache_clear()
    for unit in units:
        yield unit, claims.measure(model, unit.spec["text"][0], unit.spec["tokens"], pairs=unit.spec["pairs"])


KINDS: dict[str, Callable[[str, Sequence[Unit]], Iterator[tuple[Unit, Found]]]] = {
    "decode": _decode,
    "both": _both,
    "prefill": _prefill,
    "needles": _needles,
    "needles_whole": partial(_needles, replays=False),
    "dialogues": _dialogues,
    "claims": _claims,
}


def batches(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return units in groups that one text serves, without changing their order."""
    groups: list[list[Unit]] = []
    last: Any = None
    for unit in units:
        key = (unit.experiment, *(str(unit.spec.get(name)) for name in _TOGETHER))
        if key != last or len(groups[-1]) == _MOST[unit.spec["kind"]]:
            groups.append([])
        groups[-1].append(unit)
        last = key
    return groups


def run(units: Sequence[Unit], model: str) -> list[Row]:
    """Do one batch here on the model at ``model``; a stack that fails gives a row with its error."""
    started = time.process_time()
    try:
        found = list(KINDS[units[0].spec["kind"]](model, units))
    except Exception as error:
        if len(units) > 1:  # one stack must not take the others with it
            return [row for unit in units for row in run([unit], model)]
        found = [(units[0], {"error": f"{type(error).__name__}: {error}"})]
    gc.collect()
    seconds = round((time.process_time() - started) / len(units), 2)
    made = provenance()
    where = {name: made[name] for name in ("device", "threads", "commit", "date")}
    where |= {name: made["versions"][name] for name in ("torch", "python")}
    return [
        {
            "experiment": unit.experiment,
            "unit": unit.spec,
            "found": each,
            "seconds": seconds,
            "made": where,
        }
        for unit, each in found
    ]


def run_all(units: Sequence[Unit], workers: int, model: str) -> Iterator[list[Row]]:
    """Do all units in ``workers`` processes of one thread each; a batch's rows are given out as it ends."""
    waiting = batches(units)
    if workers == 1:
        torch.set_num_threads(1)
        yield from (run(batch, model) for batch in waiting)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run, batch, model) for batch in waiting]
        try:
            for future in as_completed(futures):
                if isinstance(future.exception(), BrokenExecutor):
                    raise ConfigError("a process died (out of memory?): the same command goes on, try --workers 1")
                yield future.result()
        except BaseException:
            print("waiting for the batches under way", file=sys.stderr)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

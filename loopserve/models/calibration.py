"""Keep what `loopserve calibrate` measured: from which lengths a stack pays for a model on this machine.

A file per model, dtype, format of weights and stack lies in ``calibrations`` in the cache folder of the compiled kernels. It names
the machine, the threads and the versions it holds for, and counts nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import loopserve
from loopserve.core.engine.break_even import LONG_TURN, BreakEven, Pair
from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.machine import device_name
from loopserve.core.stack.stack import PolicyStack
from loopserve.kernels import backend
from loopserve.kernels.native.library import cache_folder
from loopserve.models.model_cache import announce

_VERSION = 1
NONE = "there is none"


@dataclass(frozen=True)
class Calibration:
    """Hold a calibration that was found, or why there is none: ``missing`` is empty, or says what to do."""

    break_even: BreakEven
    date: str = ""
    missing: str = ""


def calibrated(model: PreTrainedModel, stack: PolicyStack, wanted: str) -> BreakEven | None:
    """Return the break-even of an engine for ``off`` (None) or ``auto``, and say on stderr which it is. Raises ConfigError."""
    if wanted not in ("off", "auto"):
        raise ConfigError(f"break_even: unknown {wanted!r}{did_you_mean(wanted, ('off', 'auto'))}")
    if wanted == "off" or stack.is_dense:
        return None
    found = find(model, stack)
    if found.missing:
        if found.missing != NONE:
            announce(
                f"the calibration of stack {stack.name!r} is not used: {found.missing}; `loopserve calibrate` renews it"
            )
        return None
    announce(f"stack {stack.name!r} {said(found.break_even)} (calibrated {found.date}; --break-even off ignores it)")
    return found.break_even


def said(break_even: BreakEven) -> str:
    """Return a break-even in words."""

    def of(limit: float) -> str:
        return (
            "wherever it acts"
            if not limit
            else "at no length"
            if math.isinf(limit)
            else f"from {math.ceil(limit):,} tokens on"
        )

    return (
        f"pays here {of(break_even.long_turn)} in turns of {LONG_TURN:,} new tokens and more, {of(break_even.short_turn)} in shorter "
        f"ones, {of(break_even.decode)} in decoding"
    )


def conditions(model: PreTrainedModel) -> dict[str, Any]:
    """Return what times depend on beside the model and the stack."""
    device = model.device
    return {
        "device": device_name(str(device)),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "kernels": {each["operation"]: each["implementation"] for each in backend.describe()},
        "torch": torch.__version__,
        "loopserve": loopserve.__version__,
    }


def find(model: PreTrainedModel, stack: PolicyStack) -> Calibration:
    """Return the calibration of a model under a stack, if it was measured on a machine like this one."""
    path = _path(model, stack)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["version"] != _VERSION:
            raise ValueError(f"version {read['version']}, known is {_VERSION}")
        there, here = dict(read["conditions"]), conditions(model)
        limits = {name: math.inf if each is None else float(each) for name, each in read["break_even"].items()}
        found = Calibration(BreakEven(**limits), str(read["date"]))
    except FileNotFoundError:
        return Calibration(BreakEven(), missing=NONE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Calibration(BreakEven(), missing=f"{path} cannot be read ({error})")
    unlike = [
        f"{name} {there.get(name)!r} there, {here[name]!r} here" for name in here if there.get(name) != here[name]
    ]
    if unlike:
        return Calibration(BreakEven(), missing=f"the one of {found.date} is of other conditions: {unlike[0]}")
    return found


def keep(
    model: PreTrainedModel, stack: PolicyStack, break_even: BreakEven, measured: Mapping[str, Sequence[Pair]]
) -> Path:
    """Write a calibration and return its file. ConfigError if that cannot be written."""
    path = _path(model, stack)
    content = {
        "version": _VERSION,
        "stack": stack.name,
        "conditions": conditions(model),
        "date": datetime.now(UTC).date().isoformat(),
    } | as_json(break_even, measured)
    beside = path.with_name(f".{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise ConfigError(
            f"cannot write {str(path)!r}: {error.strerror or error}; permit it, or name another folder in LOOPSERVE_CACHE"
        ) from error
    return path


def as_json(break_even: BreakEven, measured: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Return a result as JSON has it: None for ``inf``."""
    return {
        "break_even": {name: None if math.isinf(each) else each for name, each in asdict(break_even).items()},
        "measured": {name: [each._asdict() for each in pairs] for name, pairs in measured.items()},
    }


def _path(model: PreTrainedModel, stack: PolicyStack) -> Path:
    shape = {name: each for name, each in model.config.to_dict().items() if not name.startswith("_")}
    shape.pop("transformers_version", None)
    modules = sorted({type(each).__name__ for each in model.modules()})  # quantised layers have classes of their own
    text = json.dumps([shape, str(model.dtype), modules, stack.digest], sort_keys=True, default=str)
    return cache_folder() / "calibrations" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

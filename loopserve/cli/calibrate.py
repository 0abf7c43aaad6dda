"""Define ``loopserve calibrate``: measure from which lengths a stack pays for a model on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from loopserve.cli.options import (
    DeviceOption,
    DtypeOption,
    Format,
    FormatOption,
    ModelArgument,
    RevisionOption,
    Settings,
    StackOption,
    TrustOption,
    Weights,
    WeightsOption,
)
from loopserve.cli.output import milliseconds, print_json, print_table, progress

_KINDS = {"long_turn": "long turn", "short_turn": "short turn", "decode": "a token"}


def calibrate(
    context: typer.Context,
    model: ModelArgument,
    stack: StackOption = "loopserve",
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=1024, help="Tokens to measure at, repeatable. [default: 2048, 4096, 6144, 8000, as far as they fit]"
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = Weights.AUTO,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Measure from which lengths a stack is faster than dense attention here, and keep it for chat, run and serve.

    Takes about as long as reading the longest length four times. Let the machine do nothing else meanwhile.
    """
    from loopserve.api import Engine
    from loopserve.bench.calibration import LENGTHS, measure
    from loopserve.models.calibration import as_json, keep, said
    from loopserve.models.quiet import quiet_libraries

    settings: Settings = context.obj
    chosen = settings.stack(stack)
    with quiet_libraries(), progress() as report:
        engine = Engine.from_pretrained(
            model,
            chosen,
            dtype=dtype,
            device=device,
            weights=weights.value,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        measured = measure(engine, length or LENGTHS, report)
    found = measured.break_even
    path = keep(engine.model, chosen, found, measured._asdict())
    if format is Format.JSON:
        print_json(as_json(found, measured._asdict()) | {"file": path})
        return
    cells = [
        (
            f"{each.tokens:,}",
            _KINDS[kind],
            milliseconds(each.dense_s * 1e3),
            milliseconds(each.sparse_s * 1e3),
            f"{each.dense_s / each.sparse_s:.2f}",
        )
        for kind, pairs in measured._asdict().items()
        for each in pairs
    ]
    print_table(("tokens", "work", "dense", chosen.name, "times as fast"), cells)
    print(f"stack {chosen.name!r} {said(found)}")
    print(f"kept in {path}; chat, run and serve stay dense below")

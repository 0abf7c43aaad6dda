"""Check that the result of a policy can be used. PolicyError says what is wrong with it.

The checks are fast enough for every call: types, shapes, dtypes, devices and counts. Checks of every number (order and range of a
selection) are made by the cache when it applies a selection. Kernels check the numbers that they use as addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.errors import Fault, PolicyError
from loopserve.core.kv.cache import LayerCache
from loopserve.core.policy.interfaces import AttentionInputs, KVSelection, Observation, Retention
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern, DensePattern, LinePattern
from loopserve.core.policy.row_groups import RowGroups

_OURS = (DensePattern, LinePattern, BlockPattern, RowGroups)  # their kernels are part of loopserve
_ROWS_LOOKED_AT = 8


def check_selection(
    selection: KVSelection, cache: LayerCache, retention: Retention, most: int | None, outputs: int
) -> None:
    """Check a selection for one layer before it is passed to the cache. Raises PolicyError.

    most: pairs per KV head that the policy may make attended. outputs: tokens of this answer, which are attended in addition.
    """
    if not isinstance(selection, KVSelection):
        raise PolicyError(f"a selection must be a KVSelection, got {type(selection).__name__}")
    if selection.retention is not retention:
        raise PolicyError(f"a selection says {selection.retention}, the policy declares {retention}")
    if type(selection.boundary) is not int:
        raise PolicyError(f"KVSelection.boundary: expected an int, got {type(selection.boundary).__name__}")
    assert cache.store is not None
    heads, device = cache.store.heads, cache.store.device
    for name in ("indices", "lengths"):
        tensor = getattr(selection, name)
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.long:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PolicyError(f"KVSelection.{name}: expected int64, got {got}")
        if tensor.device != device:
            raise PolicyError(f"KVSelection.{name}: is on {tensor.device}, the store is on {device}")
    selection.check_form(heads, cache.seen)
    if most is None:
        return
    chosen = int(selection.lengths.sum()) if selection.ragged else heads * selection.indices.shape[1]
    attended = chosen + heads * (cache.seen - selection.boundary - outputs)
    if chosen > heads * most or attended > heads * most:
        raise PolicyError(
            f"a selection makes {max(chosen, attended) / heads:.0f} pairs per KV head attended beside this answer's "
            f"outputs, the budget is {most}",
            Fault.BUDGET,
        )


def check_observation(observation: Observation, start: int, length: int) -> None:
    """Check the rows to compute again: sorted positions from ``start`` on. Raises PolicyError."""
    rows = observation.positions
    if not isinstance(rows, Tensor) or rows.dtype != torch.long or rows.dim() != 1 or not len(rows):
        actual = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise PolicyError(f"Observation.positions: expected int64 [r], got {actual}")
    if type(observation.prompt) is not tuple or not all(
        type(token) is int and token >= 0 for token in observation.prompt
    ):
        raise PolicyError(f"Observation.prompt: expected a tuple of token ids, got {observation.prompt!r}")
    if rows.device.type == "meta":
        raise PolicyError("Observation.positions: hold no numbers, they are on the device meta")
    first, last = int(rows[0]), int(rows[-1])
    if first < start or last >= length or bool((rows[1:] <= rows[:-1]).any()):
        raise PolicyError(
            f"Observation.positions: must rise within this turn, [{start}, {length}), got {first} to {last}"
            if not observation.again
            else f"Observation.positions: must rise within what is to be read again, [{start}, {length}), got {first} to {last}"
        )


def check_pattern(pattern: AttentionPattern, inputs: AttentionInputs) -> None:
    """Check a pattern for the new rows of one layer. Raises PolicyError.

    Under strict checks also check that it is causal and that each row sees itself.
    """
    if not isinstance(pattern, AttentionPattern):
        raise PolicyError(f"sparsify must return an AttentionPattern, got {type(pattern).__name__}")
    wanted = (inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)
    if tuple(pattern.size) != wanted:
        raise PolicyError(f"the pattern is for (heads, new tokens, tokens) {tuple(pattern.size)}, wanted is {wanted}")
    parts = pattern.parts if isinstance(pattern, RowGroups) else (pattern,)
    for part in parts:
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, Tensor) and value.device != inputs.queries.device:
                raise PolicyError(
                    f"{type(part).__name__}.{name} is on {value.device}, the queries on {inputs.queries.device}"
                )
    if inputs.strict:
        _check_cells(pattern, inputs)


def _check_cells(pattern: AttentionPattern, inputs: AttentionInputs) -> None:
    """Check a few rows of the pattern, cell by cell."""
    chosen = torch.linspace(
        0, inputs.new_tokens - 1, min(inputs.new_tokens, _ROWS_LOOKED_AT), dtype=torch.float32, device="cpu"
    ).long()
    columns = inputs.columns[chosen.to(inputs.columns.device)]
    cells = pattern.rows(columns)
    wanted = (inputs.queries.shape[0], len(columns), inputs.total_tokens)
    if cells.shape != wanted or cells.dtype != torch.bool:
        raise PolicyError(f"the pattern's rows are {cells.dtype} {list(cells.shape)}, wanted is bool {list(wanted)}")
    later = torch.arange(inputs.total_tokens, device=cells.device) > columns[:, None].to(cells.device)
    if bool((cells & later).any()):
        raise PolicyError("the pattern is not causal: a query attends to a later key")
    own = columns.to(cells.device).expand(len(cells), -1)[..., None]
    if not bool(cells.gather(2, own).all()):
        raise PolicyError("the pattern leaves a query without its own key")


def check_output(
    pattern: AttentionPattern, result: tuple[Tensor, Tensor | None], inputs: AttentionInputs, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Check the attention output of a pattern. Raises PolicyError.

    NaN is searched for if the kernel is not one of loopserve. On an accelerator this is done under strict checks only, since the
    search waits for the device.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise PolicyError(f"attend must return (output, log-sum-exp or None), got {type(result).__name__}")
    output, lse = result
    queries = inputs.queries
    wanted = {"output": (*queries.shape[:2], inputs.values.shape[2]), "log-sum-exp": tuple(queries.shape[:2])}
    for name, tensor, dtype in (("output", output, queries.dtype), ("log-sum-exp", lse, torch.float32)):
        if tensor is None and name == "log-sum-exp" and not need_lse:
            continue
        if not isinstance(tensor, Tensor):
            raise PolicyError(f"attend's {name} must be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != dtype or tensor.device != queries.device:
            raise PolicyError(
                f"attend's {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"wanted is {dtype} {list(wanted[name])} on {queries.device}"
            )
    looks = inputs.strict or (type(pattern) not in _OURS and queries.device.type == "cpu")
    if looks and bool(output.isnan().any()):
        raise PolicyError("attend's output holds NaN", Fault.NAN)
    return output, lse

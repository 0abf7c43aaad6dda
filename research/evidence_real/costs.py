"""Read off a turn what its prefill computed and what its decode steps read."""

from __future__ import annotations

from typing import Any

from loopserve.core.engine.turn import Turn
from research.evidence_real.comparison import Found


def prefill_figures(stats: Any) -> Found:
    means = stats.as_dict()
    return {
        "cells": means["prefill_cell_density"],
        "tiles": means["prefill_tile_density"],
        "coverage": means["coverage_estimated"],
        "realised": means["coverage_realised"],
        "ms": round(stats.ttft_ms, 1),
        "cells_by_layer": [
            round(sum(heads["prefill_cell_density"]) / len(heads["prefill_cell_density"]), 4)
            for _, heads in sorted(stats.head_figures().items())
            if "prefill_cell_density" in heads
        ],
    }


def costs(turn: Turn) -> Found:
    """Sums over the decode steps, of which shares are made. Bytes are of a float32 store; ``halved`` are those of a bfloat16 one."""
    stats = turn.session.stats
    attended = stats.means["attended_fraction"]
    read = dict(stats.bytes_read)
    kept = _unhalved(turn.session.slots)
    halved = sum(amount * (kept if kind == "summaries" else 0.5) for kind, amount in read.items())
    return {
        "attended": attended.total,
        "attended_of": attended.weight,
        "bytes": sum(read.values()),
        "halved": halved,
        "before": stats.observation_bytes,
        "dense": stats.dense_bytes,
        "read": {kind: round(amount) for kind, amount in read.items()},
        "steps": stats.decode_steps,
        "compressed": stats.compressed_steps,
        "held": stats.active_bytes,
        "store": stats.store_bytes,
    }


def _unhalved(slots: Any) -> float:
    """Return the bytes of key summaries beside a bfloat16 store over those beside a float32 store: codes have the same size."""
    for compressor in slots.compressors.values():
        bits, page = getattr(compressor.config, "key_bits", 0), getattr(compressor.config, "page", 0)
        if bits and page:
            codes = bits / 8
            return (codes + 4 / page) / (codes + 8 / page)
    return 0.5

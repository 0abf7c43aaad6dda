"""Every operation from several threads at once, while another one switches torch's default dtype for the whole process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.choose_columns import ColumnChoice, choose_columns
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention, decode_attention_batch
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.linear import linear
from loopserve.kernels.select_lines import select_lines
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.cases import IMPLEMENTATIONS

THREADS, TIMES = 4, 6
TOTAL, ROWS, DIM = 150, 70, 64


def operations(seed: int) -> dict[str, Callable[[], Any]]:
    """A call of every operation on numbers of a seed; those on codes of keys stand under one name."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float32)

    queries, keys, values = normal(4, ROWS, DIM), normal(2, TOTAL, DIM), normal(2, TOTAL, DIM)
    lines = [normal(4, TOTAL) > 1 for _ in range(2)]
    blocks, first = normal(4, 2, 3) > 0, torch.tensor([seed, 0])
    columns, few = torch.arange(TOTAL - ROWS, TOTAL), torch.arange(0, TOTAL, 3)[:30].expand(2, -1)
    rows = line_scores(queries, keys, columns, scaling=0.2).probabilities

    def codes() -> tuple[Tensor, ...]:
        pages = KeySummaries(16, 4)
        pages.update(keys)
        observed = torch.zeros(2, 100, dtype=torch.float32)
        jumps = pages.jumps(queries[:, :1], few[:, :9].contiguous(), 100, 20, 0.2, observed)
        heavy = pages.heavy(queries[:, :1], few[:, :9].contiguous(), 100, -4.0, 2, 20, scaling=0.2, observed=observed)
        choice = ColumnChoice(queries[:, :1], pages.keys_coded, few[:, :9], 100, 20, 2, -4.0)
        ((chosen, _),) = choose_columns([choice], scaling=0.2)
        return pages.low, pages.high, pages.logits(queries[:, :1], 0.2), jumps, *heavy, observed, chosen

    options = {"scaling": 0.2}
    return {
        "vertical_slash": lambda: vertical_slash(queries, keys, values, *lines, first_valid=first, **options),
        "block_sparse": lambda: block_sparse(queries, keys, values, blocks, first_valid=first, **options),
        "dense_attention": lambda: dense_attention(queries, keys, values, need_lse=True, **options),
        "decode_attention": lambda: decode_attention(
            queries[:, :1], keys, values, columns=few, tail=120, need_lse=True, **options
        ),
        "decode_attention_batch": lambda: [
            part
            for pair in decode_attention_batch(
                [
                    DecodeRequest(queries[:, :1], keys, values, None, few, 120),
                    DecodeRequest(queries[:, 1:2], keys[:, :99], values[:, :99], first),
                ],
                need_lse=True,
                **options,
            )
            for part in pair
        ],
        "line_scores": lambda: line_scores(queries, keys, columns, first_valid=first, **options),
        "token_scores": lambda: (token_scores(queries, keys, columns, **options),),
        "select_lines": lambda: select_lines(rows, columns, ROWS, alpha=0.9, row_floor=0.7, cost="tile"),
        "choose_lines": lambda: choose_lines(queries, keys, columns, ROWS, alpha=0.9, **options),
        "top_columns": lambda: (top_columns(rows[:, 0], 20, sink_tokens=3, recent_window=9),),
        "gather_kv": lambda: gather_kv(keys, values, few),
        "linear": lambda: (linear(keys[0, :5].bfloat16(), values[0].bfloat16(), rows[0, 0].bfloat16()),),
        "key_codes": codes,
    }


def test_every_operation_is_called() -> None:
    on_codes = {"summarise_pages", "code_logits", "code_jumps", "code_threshold", "choose_columns"}
    assert set(operations(0)) - {"key_codes"} | on_codes == set(backend.operations())


@pytest.fixture
def switched() -> Iterator[None]:
    """The default dtype changes all the time, and threads change places often."""
    done, interval, before = threading.Event(), sys.getswitchinterval(), torch.get_default_dtype()

    def switch() -> None:
        while not done.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)

    thread = threading.Thread(target=switch)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
        torch.set_default_dtype(before)


@pytest.fixture(params=IMPLEMENTATIONS)
def wanted(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Return what one thread finds, by seed; made before the default dtype changes."""
    with backend.use(request.param):
        yield request.param, [{name: tuple(call()) for name, call in operations(s).items()} for s in range(THREADS)]


def test_threads_find_what_one_finds(wanted: tuple[str, list[dict[str, Any]]], switched: None) -> None:
    implementation, alone = wanted

    def work(seed: int) -> None:
        with backend.use(implementation):
            for _ in range(TIMES):
                for name, call in operations(seed).items():
                    # Splits depend on the number of threads that a kernel may use, and so does the last bit.
                    torch.testing.assert_close(tuple(call()), alone[seed][name], atol=1e-5, rtol=1e-5)

    with ThreadPoolExecutor(THREADS) as pool:
        for each in [pool.submit(work, seed) for seed in range(THREADS)]:
            each.result()

"""Run a model over text to find what its heads need, for ``loopserve policies search-minference`` and ``search-duo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopserve.api import Engine
from loopserve.bench.recall import RecallTask, make_dialogues
from loopserve.core.errors import InputError
from loopserve.core.policy.interfaces import PrefillSparsifier
from loopserve.core.stack.stack import PolicyStack
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.head_split import HeadScores
from loopserve.policies.prefill.head_search import HeadSearch
from loopserve.policies.prefill.line_sizes import LineSizes, SizeSearch


def searched(
    model: str, text: Path | None, tokens: int, share: float, *, dtype: str = "auto", device: str = "auto"
) -> LineSizes:
    """Return sizes per head by layer, from one prefill of at most ``tokens`` tokens of a file, or of the bundled dialogues."""
    search = SizeSearch(SizeSearch.Config(share=share))
    _run(search, model, text, tokens, dtype, device)
    return search.found()


def searched_heads(
    model: str,
    text: Path | None,
    tokens: int,
    sinks: int,
    recent: int,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> HeadScores:
    """Return far mass per KV head by layer, from one prefill of at most ``tokens`` tokens of a file, or of the bundled dialogues.

    Raises InputError for a text that is no longer than sinks and recent window together.
    """
    search = HeadSearch(HeadSearch.Config(sink_tokens=sinks, recent_window=recent))
    _run(search, model, text, tokens, dtype, device, least=sinks + recent + 1)
    return search.found()


def _run(
    search: PrefillSparsifier, model: str, text: Path | None, tokens: int, dtype: str, device: str, least: int = 64
) -> None:
    engine = Engine.from_pretrained(
        model, PolicyStack("search", search, FullDecode()), dtype=dtype, device=device, chunk_tokens=tokens
    )
    ids = _tokens(engine, text, tokens, least)
    engine.token_engine.prefill(engine.token_engine.session(), ids)


def _tokens(engine: Engine, text: Path | None, tokens: int, least: int) -> Sequence[int]:
    limit = engine.token_engine.model.max_positions
    tokens = tokens if limit is None else min(tokens, limit - 1)
    if text is None:
        dialogue = next(iter(make_dialogues(RecallTask(tokens=tokens, turns=1), 1, 0)))
        content = " ".join(turn.text for turn in dialogue.turns)
    else:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text}: cannot be read as text ({error})") from error
    ids = engine.tokenizer.turn_tokens([{"role": "user", "content": content}], None)[:tokens]
    if len(ids) < least:
        raise InputError(f"{len(ids)} tokens are too few to search on, at least {least} are needed: give a longer text")
    return ids

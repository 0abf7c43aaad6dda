"""Run a model over text to find the line sizes of its heads, for ``loopserve policies search-minference``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopserve.api import Engine
from loopserve.bench.recall import RecallTask, make_dialogues
from loopserve.core.errors import InputError
from loopserve.core.stack.stack import PolicyStack
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.prefill.line_sizes import LineSizes, SizeSearch


def searched(
    model: str, text: Path | None, tokens: int, share: float, *, dtype: str = "auto", device: str = "auto"
) -> LineSizes:
    """Return sizes per head by layer, from one prefill of at most ``tokens`` tokens of a file, or of the bundled dialogues."""
    search = SizeSearch(SizeSearch.Config(share=share))
    engine = Engine.from_pretrained(
        model, PolicyStack("search", search, FullDecode()), dtype=dtype, device=device, chunk_tokens=tokens
    )
    ids = _tokens(engine, text, tokens)
    engine.token_engine.prefill(engine.token_engine.session(), ids)
    return search.found()


def _tokens(engine: Engine, text: Path | None, tokens: int) -> Sequence[int]:
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
    if len(ids) < 64:
        raise InputError(f"{len(ids)} tokens are too few to search on: give a longer text")
    return ids

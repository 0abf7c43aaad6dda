"""R9: what is restored from disk is exact: answers to needles told before a restart, and logits bit by bit."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch

from loopserve import load_stack
from loopserve.core.engine.session import Session
from loopserve.serve.kv_files import KVFiles
from loopserve.serve.records import Path as TurnPath
from tests.serve.conftest import Running, until
from tests.serve.test_chat_completions import ask, cached, said
from tests.soak.cases import Cases, demo_engine, running
from tests.soak.tenants import QUESTION, WORDS

CITIES = ("lisbon", "oslo", "paris", "rome", "berlin", "madrid")


def run(cases: int, seed: int = 0) -> Cases:
    """Tell ``cases`` needles in conversations of their own, restart, and ask for each beside a server that never stopped."""
    found, draw, told = Cases(), random.Random(seed), []
    stacks = {name: load_stack(name) for name in ("dense", "snapkv")}
    with tempfile.TemporaryDirectory() as folder, running() as never_stopped:
        with running(session_dir=Path(folder), stacks=stacks) as server:
            for _ in range(cases):
                fact = f"the code of {draw.choice(CITIES)} is {' '.join(draw.sample(WORDS, 3))} ."
                stack = draw.choice(["loopserve", *stacks])
                told.append((fact, stack, _turn(server, [{"role": "user", "content": fact}], stack)))
            until(lambda: server.conversations.files.written == cases)
        with running(session_dir=Path(folder), stacks=stacks) as again:
            for number, (fact, stack, messages) in enumerate(told):
                with found.case(f"needle {number} {stack}"):
                    _same_logits(again, messages, stack)
                    question = QUESTION.format(fact.split()[3])
                    reply = ask(again, [*messages, {"role": "user", "content": question}], extra_body=_chosen(stack))
                    assert cached(reply) > 0 and f"hit {cached(reply)}"
                    if stack == "loopserve":
                        other = _turn(never_stopped, [messages[0]], stack)
                        assert said(reply) == said(ask(never_stopped, [*other, {"role": "user", "content": question}]))
            with found.case("all were restored"):
                assert again.conversations.files.restored >= cases
                assert not again.conversations.files.damaged
    return found


def _chosen(stack: str) -> dict[str, object]:
    return {} if stack == "loopserve" else {"loopserve": {"stack": stack}}


def _turn(server: Running, messages: list[dict[str, str]], stack: str) -> list[dict[str, str]]:
    return [*messages, said(ask(server, messages, extra_body=_chosen(stack)))]


def _same_logits(server: Running, messages: list[dict[str, str]], stack: str) -> None:
    """Restored pairs give the logits of the pairs that a session holds which computed the same turn and was never stopped."""
    engine, conversations = demo_engine(), server.conversations
    chosen = conversations.stacks.get(stack, engine.stack)
    kept = next(
        path
        for session in conversations.store.sessions()
        if session.head is not None
        and (path := conversations.store.path(session.tenant, session.head)) is not None
        and path.messages == messages
        and path.turns[-1].stack == chosen.digest
    )
    loaded = KVFiles(conversations.store, conversations.model, engine.token_engine).load(kept, chosen)
    assert loaded is not None
    restored, living = _at(kept, chosen), engine.token_engine.session(chosen)
    loaded.restore(restored, engine.token_engine.model.device)
    turn = kept.turns[0]
    answer = iter(turn.output_tokens)
    list(
        engine.token_engine.generate(
            living, turn.prompt_tokens, lambda _: next(answer), max_new_tokens=len(turn.output_tokens)
        )
    )
    more = engine.tokenizer.turn_prompt([*kept.messages, {"role": "user", "content": "and ?"}], kept.tokens[-1]).tokens
    logits = [engine.token_engine.prefill(each, more) for each in (restored, living)]
    assert torch.equal(*logits), float((logits[0] - logits[1]).abs().max())


def _at(path: TurnPath, stack: object) -> Session:
    session = demo_engine().token_engine.session(stack)  # type: ignore[arg-type]
    session.tokens.extend(path.tokens)
    return session

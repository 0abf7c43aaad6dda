"""loopserve's engine in bfloat16: variants ``STACK``, ``STACK@int8`` and ``STACK@int4``."""

from __future__ import annotations

from collections.abc import Iterator

import protocol
import torch

from loopserve import Engine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.scheduler import Scheduler


class Loopserve:
    packages = ("loopserve", "torch", "transformers")

    def __init__(self, given: protocol.argparse.Namespace) -> None:
        torch.set_num_threads(given.threads)
        stack, _, weights = given.variant.partition("@")
        engine = Engine.from_pretrained(str(given.model), stack, weights=weights or "auto", dtype="bfloat16")
        self.engine = engine.token_engine
        self.sessions: list = []

    def fresh(self) -> None:
        for each in self.sessions:
            each.close()
        self.sessions = []

    def answer(self, conversations: protocol.Conversations, outputs: int) -> Iterator[tuple[int, int]]:
        self.sessions = self.sessions or [self.engine.session() for _ in conversations]
        for session, full in zip(self.sessions, conversations, strict=True):
            session.go_back(protocol.common(session.tokens, full))
        new = [list(full[len(s.tokens) :]) for s, full in zip(self.sessions, conversations, strict=True)]
        sampling = SamplingConfig(max_new_tokens=outputs)
        if len(new) == 1:
            yield from ((0, token) for token in self.engine.generate(self.sessions[0], new[0], sampling))
            return
        scheduler = Scheduler(self.engine, max_sessions=len(new), max_num_batched_tokens=4096)
        requests = [scheduler.submit(session, ids, sampling) for session, ids in zip(self.sessions, new, strict=True)]
        told = [0] * len(new)
        while not all(each.done.is_set() for each in requests):
            scheduler.step()
            for number, request in enumerate(requests):
                made = request.result() if request.done.is_set() else request.output
                yield from ((number, token) for token in made[told[number] :])
                told[number] = len(made)


if __name__ == "__main__":
    protocol.serve(lambda: Loopserve(protocol.options(__doc__)))

"""Be a peer for the tests of ``benchmarks/peers``: answers follow from the conversation, ``--variant`` says what goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import protocol


class FakePeer:
    packages = ("pytest",)

    def __init__(self, given: protocol.argparse.Namespace) -> None:
        self.variant = given.variant
        if self.variant == "no model":
            raise ValueError("the model has no weights")
        self.nearest: list[list[dict[str, float]]] | None = None
        self.log = given.cache / f"asked-{given.variant}"

    def fresh(self) -> None:
        print("libraries print what they like")

    def answer(self, conversations: protocol.Conversations, outputs: int) -> Iterator[tuple[int, int]]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            print([list(each) for each in conversations], file=file)
        if self.variant == "second" and 3 < len(conversations[0]) < 100:
            raise ValueError("no second\nturn")
        if self.variant == "dies":
            os._exit(3)
        if self.variant == "raises":
            raise MemoryError("no room in /some/where for it")
        self.nearest = [[] for _ in conversations] if self.variant == "reference" else None
        for made in range(outputs - (self.variant == "short")):
            for number, full in enumerate(conversations):
                token = (sum(full) + made) % 50
                if self.nearest is not None:
                    self.nearest[number].append({str(token): 0.0, str(token + 100): 0.05})
                yield number, token + {"rounds": 100, "differs": 200}.get(self.variant, 0) * (made == 2)


if __name__ == "__main__":
    protocol.serve(lambda: FakePeer(protocol.options(__doc__)))

"""transformers' own model and caches: variants ``DTYPE-dynamic`` and ``DTYPE-static``; ``reference`` is float32 and dynamic.

The reference also says which tokens came next to the chosen ones, so that a difference by rounding can be told from another answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import protocol
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

NEAREST = 20


class Transformers:
    packages = ("torch", "transformers")

    def __init__(self, given: protocol.argparse.Namespace) -> None:
        torch.set_num_threads(given.threads)
        self.dtype, _, self.cache_kind = given.variant.partition("-")
        self.nearest: list[list[dict[str, float]]] | None = None
        dtype = torch.float32 if self.dtype == "reference" else getattr(torch, self.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).eval()
        self.longest = given.longest
        self.fresh()

    def fresh(self) -> None:
        self.held: list[list[int]] = []
        if self.cache_kind == "static":
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.longest)
        else:
            self.cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def answer(self, conversations: protocol.Conversations, outputs: int) -> Iterator[tuple[int, int]]:
        """Answer conversations of one length in one batch."""
        full = [list(each) for each in conversations]
        self._keep_common(full)
        new = torch.tensor([each[len(held) :] for each, held in zip(full, self.held, strict=True)])
        self.nearest = [[] for _ in full] if self.dtype == "reference" else None
        for _ in range(outputs):
            logits = self.model(new, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
            for held, ids in zip(self.held, new.tolist(), strict=True):
                held.extend(ids)
            chosen = logits.argmax(-1)
            for number, token in enumerate(chosen.tolist()):
                if self.nearest is not None:
                    best = logits[number].float().log_softmax(-1).topk(NEAREST)
                    gaps = (best.values[0] - best.values).tolist()
                    self.nearest[number].append(
                        {str(each): round(gap, 4) for each, gap in zip(best.indices.tolist(), gaps, strict=True)}
                    )
                yield number, token
            new = chosen[:, None]

    def _keep_common(self, full: list[list[int]]) -> None:
        """Drop what the cache holds beyond the common part of all conversations with what it was made of."""
        self.held = self.held or [[] for _ in full]
        kept = min(protocol.common(held, each) for held, each in zip(self.held, full, strict=True))
        if too_many := len(self.held[0]) - kept:
            if self.cache_kind == "static":  # it knows no crop; what lies beyond its length is overwritten
                for layer in self.cache.layers:
                    layer.cumulative_length.fill_(kept)
            else:
                self.cache.crop(-too_many)
            self.held = [each[:kept] for each in self.held]


if __name__ == "__main__":
    protocol.serve(lambda: Transformers(protocol.options(__doc__)))

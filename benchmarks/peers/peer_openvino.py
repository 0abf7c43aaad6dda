"""OpenVINO GenAI's continuous batching with prefix caching: variants ``dense``, ``xattention``, ``trishape``, ``eviction``.

Weights are compressed to int8 when the model is exported, at the first use; the plugin computes in the CPU's best precision and keeps
the KV cache in 8 bits, its defaults. Sparse attention is as the library sets it; eviction keeps 1,024 tokens.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
import protocol

KEPT = 1024


class OpenVino:
    packages = ("openvino", "openvino-genai", "optimum-intel", "nncf")

    def __init__(self, given: protocol.argparse.Namespace) -> None:
        self.model = exported(given.model, given.cache)
        self.properties = {"INFERENCE_NUM_THREADS": given.threads}
        self.scheduling = genai.SchedulerConfig()
        self.scheduling.enable_prefix_caching = True
        self.scheduling.max_num_batched_tokens = 2048
        if given.variant in ("xattention", "trishape"):
            self.scheduling.use_sparse_attention = True
            self.scheduling.sparse_attention_config = genai.SparseAttentionConfig(
                mode=getattr(genai.SparseAttentionMode, given.variant.upper())
            )
        elif given.variant == "eviction":
            self.scheduling.use_cache_eviction = True
            self.scheduling.cache_eviction_config = genai.CacheEvictionConfig(
                start_size=32, recent_size=128, max_cache_size=KEPT, aggregation_mode=genai.AggregationMode.NORM_SUM
            )
        self.numbers = count()
        self.fresh()

    def fresh(self) -> None:
        """Make the pipeline anew, since its prefix cache cannot be emptied, and warm it up."""
        self.pipeline = None
        self.pipeline = genai.ContinuousBatchingPipeline(str(self.model), self.scheduling, "CPU", self.properties)
        for _ in self.answer([range(100, 164)], 2):
            pass

    def answer(self, conversations: protocol.Conversations, outputs: int) -> Iterator[tuple[int, int]]:
        settings = genai.GenerationConfig()
        settings.max_new_tokens = outputs
        settings.ignore_eos = True
        handles = [
            self.pipeline.add_request(next(self.numbers), openvino.Tensor(np.array([each], dtype=np.int64)), settings)
            for each in conversations
        ]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for made in handle.read().values():
                        yield from ((number, token) for token in made.generated_ids)


def exported(model: Path, cache: Path) -> Path:
    """Return the model in OpenVINO's format, weights in int8."""
    target = cache / f"{model.name}-openvino-int8"
    if not target.exists():
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        tool = Path(sys.executable).with_name("optimum-cli")
        task = ("--task", "text-generation-with-past", "--weight-format", "int8")
        subprocess.run([tool, "export", "openvino", "--model", model, *task, part], check=True, stdout=sys.stderr)
        part.rename(target)
    return target


if __name__ == "__main__":
    protocol.serve(lambda: OpenVino(protocol.options(__doc__)))

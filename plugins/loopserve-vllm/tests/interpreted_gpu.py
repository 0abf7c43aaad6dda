"""vLLM's Triton attention under policies, in vLLM's engine on a CPU: its kernels and loopserve's run in Triton's interpreter.

Started by ``test_vllm_gpu``. vLLM's CPU platform is made to take the Triton backend in the place of its own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import vllm.triton_utils.importing

assert os.environ.get("TRITON_INTERPRET") == "1"
# On a CPU vLLM has stand-ins for Triton; and it asks for the generation of a GPU.
vllm.triton_utils.importing.HAS_TRITON = True
del sys.modules["vllm.triton_utils"]
torch.cuda.get_device_capability = lambda device=None: (9, 0)

import loopserve_vllm  # noqa: E402 (after Triton is there)
from loopserve_vllm import figures, register  # noqa: E402
from serving import Answer, alike, answer, engine, figures_since, runner_of, serve_under  # noqa: E402
from test_vllm_serving import CHOSEN, DENSE, SMALL  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend  # noqa: E402

from loopserve import load_stack  # noqa: E402
from loopserve.core.stack.stack import PolicyStack  # noqa: E402
from loopserve.kernels import backend  # noqa: E402

PROMPTS = [list(range(8, 48)), list(range(100, 210))]  # the first is too short for a selection of SMALL
# The interpreted choice of lines takes longer than a policy may.
SPARSE = {**SMALL, "prefill": {"policy": "a_shape", "local_window": 16, "sink_tokens": 4}}
OPTIONS: dict[str, Any] = {"block_size": 32, "max_num_batched_tokens": 128, "max_model_len": 256}
OPTIONS["num_gpu_blocks_override"] = 32


def register_on_a_cpu() -> None:
    register()
    register_backend(AttentionBackendEnum.CPU_ATTN, "loopserve_vllm.gpu.GPUBackend")


loopserve_vllm.register = register_on_a_cpu


def implementation(llm: LLM) -> str:
    return type(runner_of(llm).model.model.layers[0].self_attn.attn.impl).__name__


@pytest.fixture(scope="module")
def stock() -> list[Answer]:
    llm = engine(**OPTIONS)
    assert implementation(llm) == "TritonAttentionImpl"
    return answer(llm, PROMPTS, 4)


@pytest.fixture(scope="module")
def served(stock: Any) -> LLM:
    llm = engine("dense", **OPTIONS)
    assert implementation(llm) == "GPULayer"
    return llm


@pytest.mark.parametrize(("stack", "within"), [(DENSE, 1e-5), (CHOSEN, 1e-3)], ids=["dense", "every pair chosen"])
def test_without_a_limit_it_is_stock_vllm(served: LLM, stock: list[Answer], stack: PolicyStack, within: float) -> None:
    serve_under(served, stack)
    before = len(figures())
    with backend.use("triton"):
        most = alike([answer(served, PROMPTS, 4)], [stock])
    print(f"largest difference of a logit: {most:.1e}")
    assert most < within
    for each in figures_since(before):
        assert each["attended_fraction"] == each["prefill_cell_density"] == 1.0 and not each["faults"]
        assert not {"gathered_keys", "gathered_values", "chosen_pairs"} & each.keys()  # read through the block table


def test_a_sparse_stack_answers_as_over_gathered_pairs(served: LLM) -> None:
    """One request of the batch is dense in decoding, the other one sparse."""
    found, said = {}, {}
    for kernels in ("auto", "triton"):
        serve_under(served, load_stack(SPARSE))
        before = len(figures())
        with backend.use(kernels):
            found[kernels] = answer(served, PROMPTS, 4)
        said[kernels] = figures_since(before)
    assert alike([found["triton"]], [found["auto"]]) < 1e-3
    for here, there in zip(said["triton"], said["auto"], strict=True):
        for figure in ("attended_fraction", "prefill_cell_density", "faults"):
            assert here[figure] == pytest.approx(there[figure], abs=1e-6), figure
    assert said["triton"][0]["attended_fraction"] == 1.0 and said["triton"][1]["attended_fraction"] < 0.9
    assert said["triton"][1]["prefill_cell_density"] < 1.0
    assert said["auto"][1]["chosen_pairs"] and "chosen_pairs" not in said["triton"][1]
    assert said["auto"][1]["gathered_values"] and "gathered_values" not in said["triton"][1]


def test_attention_under_a_stack_stays_out_of_cuda_graphs(served: LLM) -> None:
    from loopserve_vllm.gpu import GPUBackend

    config = served.llm_engine.vllm_config
    with set_current_vllm_config(config):
        assert GPUBackend.get_builder_cls().get_cudagraph_support(config, None) is AttentionCGSupport.NEVER

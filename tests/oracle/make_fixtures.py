"""Runs kvpress on a small random model and freezes what it answers; ``make oracle`` runs this in an environment of its own.

What is captured of a layer: rotated queries, keys and values at the end of a prompt, and its output weight. What is frozen
of each press: its scores, and the columns each KV head keeps. Known defects of kvpress (chunked presses, batches of AdaKV,
constant channels in LagKV) are left out: there, tests/oracle and tests/policies hold references of their own.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

FOLDER = Path(__file__).parent / "fixtures"
SEED = 7
LAYERS, LAYER = 3, 1
SHARPNESS = 5.0  # random weights attend evenly; scaled ones have peaks, so that no choice hangs on the last bit
MODELS = {
    "grouped": {"heads": 8, "kv_heads": 2, "dim": 16, "tokens": 160},
    "single": {"heads": 4, "kv_heads": 4, "dim": 32, "tokens": 97},
}
SnapKV, EA, Ada = kvpress.SnapKVPress, kvpress.ExpectedAttentionPress, kvpress.AdaKVPress
Critical, Chunk, Pyramid = kvpress.CriticalKVPress, kvpress.ChunkKVPress, kvpress.PyramidKVPress

# name: (press for a compression ratio, pairs kept per head on the average, needs the whole attention matrix)
PRESSES: dict[str, tuple[Callable[[float], Any], int, bool]] = {
    "snapkv": (lambda r: SnapKV(r, window_size=16, kernel_size=5), 48, False),
    "snapkv_wide": (lambda r: SnapKV(r, window_size=8, kernel_size=7), 30, False),
    "tova": (lambda r: kvpress.TOVAPress(r), 40, False),
    "observed_attention": (lambda r: kvpress.ObservedAttentionPress(r), 40, True),
    "streaming_llm": (lambda r: kvpress.StreamingLLMPress(r, n_sink=4), 40, False),
    "knorm": (lambda r: kvpress.KnormPress(r), 40, False),
    "keydiff": (lambda r: kvpress.KeyDiffPress(r), 40, False),
    "expected_attention": (lambda r: EA(r, n_future_positions=512, n_sink=4), 40, False),
    "expected_attention_mean": (
        lambda r: EA(r, n_future_positions=64, n_sink=2, use_covariance=False, use_vnorm=False),
        40,
        False,
    ),
    "expected_attention_epsilon": (lambda r: EA(r, n_future_positions=128, n_sink=4, epsilon=1e-2), 40, False),
    "lagkv": (lambda r: kvpress.LagKVPress(r, n_sink=4, lag_size=16), 40, False),
    "lagkv_cross": (lambda r: kvpress.LagKVPress(r, n_sink=4, lag_size=16, cross_scoring=True), 70, False),
    "lagkv_short": (lambda r: kvpress.LagKVPress(r, n_sink=4, lag_size=128), 40, False),
    "criticalkv_snapkv": (lambda r: Critical(SnapKV(r, window_size=8)), 40, False),
    "criticalkv_expected": (lambda r: Critical(EA(r, use_vnorm=False), epsilon=1e-4, first_stage_ratio=0.3), 40, False),
    "adakv_snapkv": (lambda r: Ada(SnapKV(r, window_size=8)), 40, False),
    "adakv_expected": (lambda r: Ada(EA(r, epsilon=1e-2), alpha_safeguard=0.4), 30, False),
    "adakv_knorm": (lambda r: Ada(kvpress.KnormPress(r)), 40, False),
    "adakv_critical": (lambda r: Ada(Critical(SnapKV(r, window_size=8))), 40, False),
    "chunkkv_snapkv": (lambda r: Chunk(SnapKV(r, window_size=8), chunk_length=8), 48, False),
    "chunkkv_knorm": (lambda r: Chunk(kvpress.KnormPress(r), chunk_length=5), 40, False),
    "pyramidkv": (lambda r: Pyramid(r, window_size=8, beta=5), 32, False),
}
BUDGETS = [
    (total, mean, window, beta, layers)
    for total in (97, 160, 1000, 5000)
    for mean in (32, 60, 500)
    for window in (8, 32)
    for beta in (2, 20)
    for layers in (2, 3, 32)
    if mean < total
]


def tiny(heads: int, kv_heads: int, dim: int, implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=heads * dim,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        attn_implementation=implementation,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(SHARPNESS)
            layer.self_attn.k_proj.weight.mul_(SHARPNESS)
            layer.self_attn.rotary_emb = model.model.rotary_emb  # presses read it from the module
    return model


def capture(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, Any]:
    """What kvpress's own hook would see of one layer at the end of the prompt."""
    found: dict[str, Any] = {}

    def hook(module: Any, _: Any, options: dict[str, Any], output: Any) -> None:
        cache = options["past_key_values"].layers[module.layer_idx]
        found.update(module=module, hidden=options["hidden_states"], attention=output[1], options=options)
        found.update(keys=cache.keys, values=cache.values)

    handle = model.model.layers[LAYER].self_attn.register_forward_hook(hook, with_kwargs=True)
    model(ids, past_key_values=DynamicCache(config=model.config))
    handle.remove()
    return found


def queries_of(found: dict[str, Any], heads: int, dim: int) -> torch.Tensor:
    queries = found["module"].q_proj(found["hidden"]).view(1, -1, heads, dim).transpose(1, 2)
    cos, sin = (each.unsqueeze(1) for each in found["options"]["position_embeddings"])
    return queries * cos + rotate_half(queries) * sin


def kept_columns(press: Any, found: dict[str, Any], scores: torch.Tensor | None) -> list[list[int]]:
    """The columns each KV head keeps, from what ``compress`` leaves of keys that are all different."""
    module = found["module"]
    module.masked_key_indices = None
    keys, _ = press.compress(
        module, found["hidden"], found["keys"].clone(), found["values"].clone(), found["attention"], found["options"]
    )
    masked = module.masked_key_indices
    module.masked_key_indices = None
    if masked is not None:
        keep = torch.ones(found["keys"].shape[:3], dtype=torch.bool)
        keep[masked] = False
        return [row.nonzero().flatten().tolist() for row in keep[0]]
    columns = []
    for left, whole in zip(keys[0], found["keys"][0], strict=True):
        same = (left[:, None] == whole[None]).all(-1)
        assert bool((same.sum(1) == 1).all())
        columns.append(sorted(same.float().argmax(1).tolist()))
    return columns


def freeze(name: str, heads: int, kv_heads: int, dim: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(SEED))
    fused = capture(tiny(heads, kv_heads, dim, "sdpa"), ids)
    whole = capture(tiny(heads, kv_heads, dim, "eager"), ids)
    tensors = {
        "queries": queries_of(fused, heads, dim)[0],
        "keys": fused["keys"][0],
        "values": fused["values"][0],
        "output_weight": fused["module"].o_proj.weight,
    }
    kept: dict[str, Any] = {}
    for press_name, (make, wanted, matrix) in PRESSES.items():
        press = make(
            1 - (wanted + 0.5) / tokens
        )  # half a pair more, so that int() cannot fall short by a rounding error
        found = whole if matrix else {**fused, "attention": None}
        scores = None
        if hasattr(press, "score") and press_name != "pyramidkv":
            scores = press.score(
                found["module"], found["hidden"], found["keys"], found["values"], found["attention"], found["options"]
            )
            tensors[f"scores.{press_name}"] = scores[0].float()
        kept[press_name] = kept_columns(press, found, scores)
    save_file({key: each.detach().contiguous() for key, each in tensors.items()}, FOLDER / f"{name}.safetensors")
    return {"heads": heads, "kv_heads": kv_heads, "dim": dim, "tokens": tokens, "kept": kept}


def pyramid_budgets() -> list[dict[str, Any]]:
    rows = []
    for total, mean, window, beta, layers in BUDGETS:
        press = Pyramid(1 - (mean / total), window_size=window, beta=beta)
        config = type("Config", (), {"num_hidden_layers": layers})
        modules = [type("Module", (), {"config": config, "layer_idx": index}) for index in range(layers)]
        found = [press.get_layer_budget(module, total) for module in modules]
        rows.append({"total": total, "mean": mean, "window": window, "beta": beta, "budgets": found})
    return rows


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with torch.no_grad():
        models = {name: freeze(name, **shape) for name, shape in MODELS.items()}
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    record = {
        "made by": "make oracle",
        "seed": SEED,
        "layer": LAYER,
        "versions": {"python": platform.python_version(), **versions},
        "models": models,
        "pyramid_budgets": pyramid_budgets(),
    }
    (FOLDER / "kvpress.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"frozen: {len(PRESSES)} presses on {len(MODELS)} models with kvpress {versions['kvpress']}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Try loopserve on a tiny random model of every causal language model family of the installed transformers.

``python -m research.families docs/families.md`` writes the table. A family is exact if, under the stack ``dense``, the logits of a
prompt and of a second pass over its cache are those of transformers within 1e-3; refused if loopserve names the reason. Anything
else is a fault.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopserve

VOCABULARY = 120
LARGEST = 20_000_000  # parameters: a family that ignores the small sizes is left out
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "ffn_dim": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
}


def tiny(kind: str) -> PreTrainedModel | str:
    """Return a random model of a family, or why there is none."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(kind, **SIZES)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
        if sum(each.numel() for each in shape.parameters()) > LARGEST:
            return "its configuration ignores the small sizes"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                    weights.mul_(8)  # attention that is not flat, so that a wrong one shows
            model(torch.tensor([[3, 4, 5]]))
    except Exception as error:  # another project's code with sizes that it may not expect
        return f"cannot be built with these sizes: {type(error).__name__}"
    return model


def outcome(kind: str) -> tuple[str, str]:
    """Return (exact, refused, not built or FAULT; details) for a family."""
    model = tiny(kind)
    if isinstance(model, str):
        return "not built", model
    ids = torch.randint(3, VOCABULARY - 2, (1, 30), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            plain = model(ids).logits
            with loopserve.apply(model, "dense"):
                error = float((model(ids).logits - plain).abs().max())
                cache = model(ids[:, :20]).past_key_values
                later = model(ids[:, 20:], past_key_values=cache).logits
                error = max(error, float((later - plain[:, 20:]).abs().max()))
    except loopserve.LoopServeError as refusal:
        return "refused", " ".join(str(refusal).split())
    except Exception as failure:  # a raw error is what this script looks for
        return "FAULT", f"{type(failure).__name__}: {' '.join(str(failure).split())[:150]}"
    return ("exact", "") if error < 1e-3 else ("FAULT", f"logits differ by {error:.2g}")


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield family, outcome and details of every family."""
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield kind, *outcome(kind)


def page(found: list[tuple[str, str, str]], seconds: float) -> str:
    """Return the page of a run."""
    counts = Counter(each[1] for each in found)
    exact = ", ".join(f"`{kind}`" for kind, result, _ in found if result == "exact")
    lines = [
        "# Model families",
        "",
        "Made by `python -m research.families docs/families.md`: a tiny random model of every causal family of transformers",
        f"{version('transformers')}, under the stack `dense`, its logits compared with transformers' own ({seconds:.0f} s, 2 cores).",
        "",
        ", ".join(f"{count} {result}" for result, count in sorted(counts.items())) + ".",
        "",
        f"Exact: {exact}.",
        "",
        "| family | outcome | details |",
        "|---|---|---|",
        *(f"| `{kind}` | {result} | {details} |" for kind, result, details in found if result != "exact"),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the page to write")
    target = parser.parse_args().page
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    started, found = time.perf_counter(), []
    for row in rows():
        print(" | ".join(row), flush=True)
        found.append(row)
    target.write_text(page(found, time.perf_counter() - started), encoding="utf-8")


if __name__ == "__main__":
    main()

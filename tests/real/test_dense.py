"""Under the stack ``dense`` a pretrained model gives what transformers gives; conversations and weights survive their files."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import loopserve
from loopserve.api import Engine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.models.catalog import CATALOG, fetch

NEW = 12


def prompt(tokenizer: Any, prose: str, length: int) -> torch.Tensor:
    """Tokens of the prose, from the beginning again where it ends."""
    ids = tokenizer(prose)["input_ids"]
    ids = (ids * (length // len(ids) + 1))[:length]
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def generated(model: Any, ids: torch.Tensor) -> list[int]:
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("length", [500, 2000, 6000])
def test_dense_equals_transformers_token_for_token(plain: Any, served: Any, prose: str, length: int) -> None:
    ids = prompt(plain[1], prose, length)
    expected = generated(plain[0], ids)
    engine = Engine(*served, "dense")
    with closing(engine.token_engine.session()) as session:
        config = SamplingConfig(max_new_tokens=NEW)
        assert list(engine.token_engine.generate(session, ids[0].tolist(), config, engine.stop_ids)) == expected


def test_apply_equals_transformers(plain: Any, prose: str) -> None:
    ids = prompt(plain[1], prose, 700)
    expected = generated(plain[0], ids)
    with loopserve.apply(plain[0], "dense"):
        assert generated(plain[0], ids) == expected
    assert generated(plain[0], ids) == expected


def test_a_saved_conversation_goes_on_with_the_same_answer(served: Any, prose: str, tmp_path: Path) -> None:
    engine = Engine(*served, "dense")
    with engine.session() as chat:
        chat.send(f"{prose[:2500]}\n\nThe magic number of the ship is 48213. What is the text about?", max_new_tokens=8)
        chat.save(tmp_path / "talk.json")
        expected = chat.send("What is the magic number of the ship?", max_new_tokens=NEW)
    with engine.load_session(tmp_path / "talk.json") as chat:
        assert chat.send("What is the magic number of the ship?", max_new_tokens=NEW).token_ids == expected.token_ids


def test_the_loaded_weights_are_those_that_gguf_dequantises(plain: Any) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model = plain[0]
    state = model.state_dict()
    tensors = {each.name: each for each in GGUFReader(fetch(CATALOG["smollm2"])).tensors}

    def file(name: str) -> torch.Tensor:
        return torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    config = model.config
    names = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    assert torch.equal(state["model.embed_tokens.weight"], file("token_embd.weight"))
    assert torch.equal(state["model.norm.weight"], file("output_norm.weight"))
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            assert torch.equal(state[f"model.layers.{layer}.{ours}.weight"], file(f"blk.{layer}.{theirs}.weight")), ours
        for kind, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            # GGUF stores the two halves of a rotated head interleaved.
            stored = file(f"blk.{layer}.attn_{kind}.weight")
            halves = stored.view(heads, stored.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(stored.shape)
            assert torch.equal(state[f"model.layers.{layer}.self_attn.{kind}_proj.weight"], halves)

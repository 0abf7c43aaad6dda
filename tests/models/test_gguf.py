"""GGUF files are converted once, rightly, and loaded from the copy; what cannot be loaded is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers import LlamaConfig, LlamaForCausalLM

import loopserve
from loopserve.core.errors import ModelError
from loopserve.models import conversion
from loopserve.models.conversion import RECORD, conversions, converted
from loopserve.models.loading import load, load_layers
from tests.models.gguf_files import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, POSITIONS, TEMPLATE, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder."""
    monkeypatch.setenv("LOOPSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def _independent(path: Path) -> LlamaForCausalLM:
    """Return the model of a file, built without transformers' reader: dequantised by gguf, rows of q and k put in order."""
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    weights = {}
    for tensor in GGUFReader(path).tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        parts = tensor.name.split(".")
        if parts[-2] in ("attn_q", "attn_k"):  # a file holds channels i and i + half of a head in rows 2 i and 2 i + 1
            heads = weight.split(HEAD)
            weight = torch.cat([each[start::2] for each in heads for start in (0, 1)])
        name = f"model.layers.{parts[1]}.{names[parts[2]]}" if parts[0] == "blk" else top[parts[0]]
        weights[f"{name}.weight"] = weight
    config = LlamaConfig(
        vocab_size=len(weights["lm_head.weight"]),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_the_logits_are_those_of_an_independent_reading(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", kind=GGMLQuantizationType[kind])
    model, tokenizer = load(str(path), dtype="float32")
    expected = _independent(path)
    ids = tokenizer("hello  12 there", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("BF16", "bfloat16"), ("Q8_0", "float32")])
def test_the_copy_has_the_narrowest_dtype_that_is_exact(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", kind=GGMLQuantizationType[kind], rounded_norms=True)
    assert json.loads((converted(path) / "config.json").read_text())["dtype"] == dtype  # load may widen it for a CPU


def test_template_tokens_and_stop_tokens_come_from_the_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", more={"tokenizer.ggml.eot_token_id": 0, "general.sampling.temp": 0.5})
    model, tokenizer = load(str(path))
    assert tokenizer.chat_template == TEMPLATE
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert tokenizer.model_max_length == POSITIONS
    assert model.generation_config.eos_token_id == [2, 0]
    assert model.generation_config.do_sample is True
    assert model.generation_config.temperature == 0.5


def test_the_end_of_a_message_ends_an_answer_though_the_file_names_the_end_of_text_only(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", more={})
    model, _ = load(str(path))
    assert model.generation_config.eos_token_id == 2
    assert not model.generation_config.do_sample


def test_digits_are_split_as_the_file_says(tmp_path: Path) -> None:
    """Two blanks before a digit are one token where digits are split off first, and two where they are not."""
    _, single = load(str(write_gguf(tmp_path / "a.gguf", splits_as="smollm")))
    _, plain = load(str(write_gguf(tmp_path / "b.gguf", splits_as="gpt-2")))
    assert single.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert plain.tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]


def test_a_conversation_runs_under_the_preset(tiny: Path) -> None:
    engine = loopserve.Engine.from_pretrained(str(tiny), stack="loopserve")
    with engine.session() as chat:
        reply = chat.send("hello", max_new_tokens=4)
    assert 1 <= len(reply.token_ids) <= 4
    assert [each.head_dim for each in load_layers(str(tiny))] == [HEAD] * LAYERS


def _refuse(*_: Any) -> None:
    raise AssertionError("converted again")


def test_the_second_start_needs_neither_the_conversion_nor_the_package(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = load(str(tiny))
    monkeypatch.setattr(conversion, "_convert", _refuse)
    monkeypatch.setattr(conversion, "check_packages", _refuse)
    second, _ = load(str(tiny))
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight)


def test_a_changed_file_is_converted_anew_and_a_renamed_one_is_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = converted(tiny)
    write_gguf(tiny, seed=1)
    assert converted(tiny) != first
    renamed = tiny.rename(tiny.with_name("other.gguf"))
    monkeypatch.setattr(conversion, "_convert", _refuse)
    converted(renamed)
    assert len(conversions()) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", RECORD])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_a_damaged_copy_is_made_anew(tiny: Path, file: str, damage: str) -> None:
    folder = converted(tiny)
    path = folder / file
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = before[:-40] + bytes([before[-40] ^ 1]) + before[-39:]
        path.write_bytes({"flipped": flipped, "cut": before[: len(before) // 2], "empty": b""}[damage])
    assert converted(tiny) == folder
    if file != RECORD or damage != "flipped":  # a letter of a name in the record may differ without harm
        assert path.read_bytes() == before


def test_a_copy_of_an_older_format_is_made_anew(tiny: Path) -> None:
    folder = converted(tiny)
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"format": conversion.FORMAT - 1}))
    assert json.loads((converted(tiny) / RECORD).read_text())["format"] == conversion.FORMAT


def test_what_a_killed_process_left_is_removed(tiny: Path, cache: Path) -> None:
    left = cache / "models" / "converted" / ".unfinished-0123"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    converted(tiny)
    assert not left.exists()


def test_a_conversion_that_breaks_off_leaves_nothing(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_write_record", broken)
    with pytest.raises(KeyboardInterrupt):
        converted(tiny)
    assert [each.name for each in (cache / "models" / "converted").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 something else", "it is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of Git LFS"),
        (b"GGUF", "it is truncated or damaged"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "it is truncated or damaged"),
    ],
)
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"cannot load model '{path}': {fault}.*; ") as raised:
        load(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file(tiny: Path, share: float) -> None:
    whole = tiny.read_bytes()
    tiny.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"it is truncated.*; download it again"):
        load(str(tiny))
    assert conversions() == []


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"cannot load model 'some/model\.gguf': there is no such file"):
        load("some/model.gguf")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"architecture": "unheardof"}, "its architecture 'unheardof' cannot be loaded"),
        ({"tokenizer": False}, "it holds no tokenizer"),
        ({"splits_as": "unheardof"}, "its tokenizer cannot be built .*'unheardof'"),
        ({"more": {"split.count": 2, "split.no": 1}}, "it is part 2 of 2 of a split model"),
        ({"more": {"general.type": "adapter"}}, "it is of the kind 'adapter'"),
        ({"without": ("blk.1.ffn_up.weight",)}, r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_a_model_that_cannot_be_served(tmp_path: Path, options: dict[str, Any], fault: str) -> None:
    path = write_gguf(tmp_path / "odd.gguf", **options)
    with pytest.raises(ModelError, match=f"cannot load model '{path}': {fault}.*; .") as raised:
        load(str(path))
    assert "\n" not in str(raised.value)
    assert conversions() == []


def test_a_part_is_known_by_its_name(tiny: Path) -> None:
    part = tiny.rename(tiny.with_name("tiny-00001-of-00002.gguf"))
    with pytest.raises(ModelError, match=r"it is part 1 of 2 of a split model; merge the parts"):
        load(str(part))


def test_packages_that_are_absent_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopserve.models.gguf_file.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ModelError, match=r"need the package gguf; pip install 'loopserve\[gguf\]'"):
        load(str(tiny))


def test_a_cache_folder_that_cannot_be_written(tiny: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(ModelError, match=r"cannot keep models in .*LOOPSERVE_CACHE"):
        load(str(tiny))

"""Write tiny GGUF files: a random Llama of two layers with a byte-level tokenizer and a ChatML template."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

HIDDEN, HEADS, KV_HEADS, LAYERS, INNER, POSITIONS = 64, 4, 2, 2, 96, 256
HEAD = HIDDEN // HEADS
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CONTROL, _NORMAL = 3, 1


def vocabulary() -> tuple[list[str], list[str]]:
    """Return (tokens, merges): three special tokens, all bytes in GPT-2's spelling, and a few merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["h e", "Ġ Ġ", "l l", "he ll", "ĠĠ ĠĠ"]
    letters = list(bytes_to_unicode().values())
    return [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *letters,
        *(each.replace(" ", "") for each in merges),
    ], merges


def weights(seed: int = 0, rounded_norms: bool = False) -> dict[str, np.ndarray]:
    """Return the matrices by their GGUF names, float32. Rows of q and k are in the order of the file format.

    rounded_norms: the vectors of the norms are exact in float16 and bfloat16.
    """
    draw = np.random.default_rng(seed)
    count = len(vocabulary()[0])
    shapes = {"token_embd.weight": (count, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (count, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
        }
    made = {name: draw.normal(size=shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    rounded = {name: np.round(8 * each) / 8 if rounded_norms else each for name, each in made.items() if "norm" in name}
    return made | {name: 1 + each for name, each in rounded.items()}


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    tokenizer: bool = True,
    splits_as: str = "smollm",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    more: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    rounded_norms: bool = False,
) -> Path:
    """Write a GGUF file and return its path. more: further metadata, ints, floats, booleans or strings. without: weights left out."""
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(POSITIONS)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    tokens, merges = vocabulary()
    writer.add_vocab_size(len(tokens))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splits_as)
        writer.add_token_list(tokens)
        writer.add_token_types([_CONTROL] * 3 + [_NORMAL] * (len(tokens) - 3))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (more or {}).items():
        add[type(value)](key, value)
    for name, matrix in weights(seed, rounded_norms).items():
        if name in without:
            continue
        exact = matrix.ndim == 1 or kind is GGMLQuantizationType.F32
        if exact:
            writer.add_tensor(name, matrix)
        else:
            writer.add_tensor(name, quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, gguf: Path, package: str = "tiny_gguf", version: str = "0.1") -> Path:
    """Write a wheel that holds a GGUF file, as pip accepts it, and return its path."""
    path, info = folder / f"{package}-{version}-py3-none-any.whl", f"{package}-{version}.dist-info"
    name = package.replace("_", "-")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, f"{package}/{gguf.name}")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package-anywhere\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path

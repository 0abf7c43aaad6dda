"""Convert GGUF files to directories of transformers, once per content. The copies are kept in the cache folder.

A copy holds the dequantised weights as safetensors, the configuration, the tokenizer, the chat template and the generation
settings. Its name is the digest of the GGUF file, so that a changed file is converted anew. A record of all its files is checked at
every start, and a copy that differs from it is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from loopserve.core.errors import ModelError
from loopserve.models.gguf_file import (
    GgufFile,
    check_header,
    check_packages,
    incomplete,
    read_gguf,
    unreadable_tokenizer,
    unsupported,
)
from loopserve.models.model_cache import announce, file_digest, models_folder, new_folder, remove, size_of, writing
from loopserve.models.quiet import quiet_libraries

FORMAT = 1  # of the copies; a change of the conversion raises it, and older copies are made anew
RECORD = "loopserve.json"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Tokens that end a message in known chat templates. Files of older converters name only the token that ends a text.
_ENDS_OF_MESSAGE = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|end_of_turn|>", "<|eom_id|>")
# Names of tokenizer.ggml.pre whose digits are separate pieces. Transformers splits their text like GPT-2's instead.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_AS_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "modern-bert"})


@dataclass(frozen=True)
class Conversion:
    """Describe a cached copy: the GGUF file's digest, its name and the model's, the copy's folder and size in bytes."""

    digest: str
    source: str
    name: str
    path: Path
    size: int


def converted(path: Path, digest: str | None = None) -> Path:
    """Return the directory of a GGUF file's converted copy. Convert the file first if there is no intact copy.

    digest: the file's SHA-256 where it is known; the file need not exist then, as long as the copy does. Raises ModelError.
    """
    if digest is None:
        check_header(path)
        digest = file_digest(path)
    target = conversions_folder() / digest
    if _intact(target):
        return target
    check_packages(str(path))
    source = read_gguf(path)
    with writing(target.parent):
        if _intact(target):  # another process was faster
            return target
        announce(f"converting {path.name}, once per file; this may take a minute")
        with new_folder(target) as folder:
            _convert(source, folder)
            _write_record(folder, source, digest)
    return target


def conversions_folder() -> Path:
    """Return the folder of converted copies."""
    return models_folder() / "converted"


def conversions() -> list[Conversion]:
    """Return all cached copies with a record, by name."""
    found = []
    for path in conversions_folder().glob("[0-9a-f]*"):
        record = _record(path)
        if record is not None:
            found.append(Conversion(path.name, str(record["source"]), str(record["name"]), path, size_of(path)))
    return sorted(found, key=lambda each: (each.source, each.digest))


def remove_conversion(digest: str) -> None:
    """Delete a cached copy, if there is one."""
    if (conversions_folder() / digest).exists():
        with writing(conversions_folder()):
            remove(conversions_folder() / digest)


def _intact(folder: Path) -> bool:
    """Return whether a copy has this format, and all its files have the sizes and digests of its record."""
    record = _record(folder)
    if record is None or record["format"] != FORMAT:
        return False
    files: dict[str, dict[str, Any]] = record["files"]
    try:
        sizes = all((folder / name).stat().st_size == each["bytes"] for name, each in files.items())
        return sizes and all(file_digest(folder / name) == each["sha256"] for name, each in files.items())
    except OSError:
        return False


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if {"format", "source", "name", "files"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _write_record(folder: Path, source: GgufFile, digest: str) -> None:
    files = {each.name: {"bytes": size_of(each), "sha256": file_digest(each)} for each in sorted(folder.iterdir())}
    record = {"format": FORMAT, "source": source.path.name, "name": source.name, "digest": digest, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _convert(source: GgufFile, folder: Path) -> None:
    """Write the transformers directory of a GGUF file into an empty folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    directory, name = str(source.path.parent), source.path.name
    with quiet_libraries(), _without_bars():
        try:
            config = AutoConfig.from_pretrained(directory, gguf_file=name)
            result: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                gguf_file=name,
                config=config,
                dtype=source.dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        except Exception as error:
            raise unsupported(source, _reason(error)) from error
        model, report = result
        absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if absent:
            raise incomplete(source, absent)
        tokenizer = _tokenizer(source)
        _set_generation(model.generation_config, tokenizer, source.metadata)
        if hasattr(model.config, "quantization_config"):  # transformers saves no model that has one
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tokenizer(source: GgufFile) -> Any:
    """Return the tokenizer of a file's metadata, with its chat template and its way to split text."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    except Exception as error:
        raise unreadable_tokenizer(source, _reason(error)) from error
    metadata = source.metadata
    if metadata["tokenizer.ggml.model"] == "gpt2":
        _set_split(tokenizer, source, str(metadata.get("tokenizer.ggml.pre", "default")))
    tokenizer.chat_template = metadata.get("tokenizer.chat_template") or tokenizer.chat_template
    length = metadata.get(f"{source.architecture}.context_length")
    if length:
        tokenizer.model_max_length = int(length)
    return tokenizer


def _set_split(tokenizer: Any, source: GgufFile, kind: str) -> None:
    """Split text as the file's byte-level tokenizer does, where transformers does otherwise. Raises ModelError if unknown."""
    from tokenizers import Regex, pre_tokenizers

    if kind in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return
    try:  # releases of transformers without this table choose by architecture
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return
    if kind not in _AS_GPT2 and kind not in GGUF_PRE_TOKENIZER_SPLITS:
        raise unreadable_tokenizer(source, f"this transformers does not know how {kind!r} splits text")


def _set_generation(config: Any, tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Set the tokens that end an answer and the sampling options that the file names."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    template = str(tokenizer.chat_template or "")
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids += [special[text] for text in _ENDS_OF_MESSAGE if text in template and text in special]
    known = list(dict.fromkeys(int(each) for each in ids if each is not None))
    if known:
        config.eos_token_id = known[0] if len(known) == 1 else known
    sampling = {
        name: metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    if sampling:
        config.do_sample = sampling.get("temperature") != 0
        if not config.do_sample:
            sampling = {name: value for name, value in sampling.items() if name == "repetition_penalty"}
        for name, value in sampling.items():
            setattr(config, name, value)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the bars of the conversion, which no setting of transformers turns off. Errors are raised, never printed."""
    with redirect_stderr(StringIO()):
        yield


def _reason(error: BaseException) -> str:
    if isinstance(error, ModelError):
        return str(error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__

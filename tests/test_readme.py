"""The examples on the front page run as they stand (other models replaced by the bundled one)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loopserve.api import load_stack
from loopserve.core.policy.registry import Registry
from loopserve.models.tiny import tiny_model

BLOCKS = re.findall(
    r"```(\w+)\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


def block(language: str, holding: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and holding in text]
    return found


def run(text: str, **names: Any) -> dict[str, Any]:
    exec(text, names)
    return names


def test_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(block("python", "chat.send").replace('"smollm2"', '"demo"'))
    assert names["reply"].usage.completion_tokens > 0
    assert capsys.readouterr().out


def test_many_conversations() -> None:
    names = run(block("python", "engine.batch").replace("Qwen/Qwen3-0.6B", "demo"))
    assert all(reply.usage.completion_tokens for reply in names["replies"])


def test_a_model_one_already_has() -> None:
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    run(block("python", "loopserve.apply"), model=tiny_model("llama"), batch={**batch, "max_new_tokens": 2})


def test_a_stack(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(block("yaml", "version: 1"), encoding="utf-8")
    stack = load_stack(file)
    assert (stack.decode_for(0, 4).name, stack.decode_for(2, 4).name) == ("full", "snapkv")


def test_a_policy() -> None:
    registry = Registry()
    run(block("python", "hookimpl"))["loopserve_register_policies"](registry)
    assert [each.name for each in registry] == ["large_keys"]

"""A tiny random model whose tokens are bytes, so that an answer can be any text, with a template of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from loopserve import Engine
from tests.models.test_chat import CHATML, byte_tokenizer
from tests.serve.conftest import Running

HERMES = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    HERMES.replace("\n<tool_call>\n", "<|python_tag|>")
    .replace("\n</tool_call>", "")
    .replace('"arguments"', '"parameters"')
)
REASONING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
UNKNOWN = HERMES.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")


def bytes_engine(template: str) -> Engine:
    tokenizer = byte_tokenizer(template)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return Engine(model, tokenizer)


class Dictated:
    """Stands in for a grammar: the answer is a given text, whatever the model would say."""

    def __init__(self, engine: Engine, text: str) -> None:
        self._ids = [*engine.tokenizer.text_tokens(text, special=False), min(engine.stop_ids)]

    def processor(self, opened: str) -> Callable[[Tensor, Tensor], Tensor]:
        ids = iter(self._ids)

        def force(input_ids: Tensor, scores: Tensor) -> Tensor:
            forced = torch.full_like(scores, float("-inf"))
            forced[0, next(ids)] = 0.0
            return forced

        return force


def dictate(server: Running, text: str) -> dict[str, Any]:
    """Have the server answer with a text; return the option that a request of chat needs for it."""
    engine = server.conversations.engine
    server.server.grammars.answer = lambda *_: Dictated(engine, text)
    return {"response_format": {"type": "json_object"}}

"""A tiny random model whose tokens are bytes, so that an answer can be any text, with a template of one's choice."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loopserve import Engine
from tests.models.test_chat import byte_tokenizer

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

"""Small tokenizers of several kinds, and chat templates that read, change or rewrite what they are given."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|channel|>", "<|message|>", "<|end|>"]
_LOOP = "{% for m in messages %}"
CHATML = (
    _LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trim": CHATML.replace("m['content'] }}", "m['content'] | trim }}"),
    "tojson": CHATML.replace("m['content'] }}", "m['content'] | tojson }}"),
    "escaped json": CHATML.replace("m['content'] }}", "m['content'] | tojson(ensure_ascii=True) }}"),
    "llama2": "{{ bos_token }}"
    + _LOOP
    + "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}"
    + _LOOP
    + "<|im_start|>{{ m['role'] }}<|im_end|>\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML.replace("m['role'] }}", "'model' if m['role'] == 'assistant' else m['role'] }}").replace(
        "m['content'] }}", "m['content'] | trim }}"
    ),
    "switch": "{% set quick = '/no_think' in messages[0]['content'] %}<|im_start|>system\nmode {{ 'quick' if quick else 'slow' }}"
    "<|im_end|>\n" + CHATML.replace("m['content'] }}", "m['content'] | replace('/no_think', '') }}"),
    "drops thinking": CHATML.replace(
        "m['content'] }}",
        "m['content'].split('</think>')[-1].lstrip() if m['role'] == 'assistant' else m['content'] }}",
    ),
    "prefills thinking": CHATML.replace(
        "m['content'] }}",
        "'<think>\n\n</think>\n' + m['content'] if m['role'] == 'assistant' else m['content'] }}",
    ).replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n\n</think>\n{%"),
    "harmony": _LOOP + "{% if m['role'] == 'assistant' %}{% if '<|channel|>' in m['content'] %}"
    "{{ raise_exception('channels in the content') }}{% endif %}{% if loop.last and m.thinking %}<|im_start|>assistant<|channel|>"
    "analysis<|message|>{{ m.thinking }}<|end|>{% endif %}<|im_start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>"
    "{% else %}<|im_start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    "counts": "turns: {{ messages | length }}\n" + CHATML,
    "plain text": _LOOP + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    "last only": "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>",
}


def _bytes(*, prefix: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("h", "i"), ("Ġ", "y"), ("Ġy", "e"), ("e", "s"), ("<", "|"), ("|", ">"), ("Ċ", "Ċ"), ("t", "e")]
    vocabulary = [*alphabet, *(a + b for a, b in pairs)]
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(vocabulary)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    return core


def _metaspace(scheme: str) -> Tokenizer:
    signs = [chr(code) for code in range(33, 127)] + ["▁", "\n", "é"]
    words = ["<unk>", "<s>", "</s>", "▁hi", "hi", "▁yes", "yes", "▁assistant", "assistant", "▁▁", *signs]
    core = Tokenizer(models.Unigram([(word, -10.0 + len(word)) for word in words], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return core


def _legacy() -> Tokenizer:
    """As converted from SentencePiece before Metaspace could do it: a normalizer puts the blank."""
    core = _metaspace("never")
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return core


def _words() -> Tokenizer:
    signs = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", "hi", "yes", *signs, *("##" + sign for sign in signs), *SPECIAL]  # as whole words as well
    core = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece()
    return core


KINDS = {
    "bytes": _bytes,
    "bytes, blank first": lambda: _bytes(prefix=True),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "legacy blank": _legacy,
    "wordpiece": _words,
    "stripping": _bytes,
    "normalized": _words,
}


@cache
def tokenizer(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind with a template by name."""
    core = KINDS[kind]()
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    flags = {"lstrip": True, "rstrip": True} if kind == "stripping" else {"normalized": kind == "normalized"}
    core.add_special_tokens([AddedToken(token, special=True, **flags) for token in SPECIAL])
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>" if "bytes" not in kind and kind != "stripping" else None,
        bos_token="<s>",
        eos_token="</s>" if template in ("llama2", "mistral") else "<|im_end|>",
    )
    found.chat_template = None if template is None else TEMPLATES[template]
    return found


def U(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def A(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def S(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}

"""A template that looks at or changes what people wrote sees the very text: switches in the system text, trim, tojson."""

from __future__ import annotations

import pytest

from loopserve.models.messages import Message
from tests.faults.chat_tokens import byte_tokenizer, fed_and_whole
from tests.models.chat_cases import CHATML, S, U

SWITCH = (
    "{% set sys = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}<|im_start|>system\n"
    "mode: {{ 'quick' if '/quick' in sys else 'slow' }}\n{{ sys | replace('/quick', '') | trim }}<|im_end|>\n"
    + CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")
)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (SWITCH, [S("be kind /quick"), U("hi")]),
        (CHATML.replace("m['content'] }}", "m['content'] | trim }}"), [U("  hi \n")]),
        (CHATML.replace("m['content'] }}", "m['content'] | tojson }}"), [U('say "x"')]),
        (CHATML.replace("m['content'] }}", "m['content'] | length }}"), [U("four")]),
        (CHATML.replace("m['content'] }}", "m['content'][:3] | upper }}"), [U("abcdef")]),
        (CHATML.replace("m['content'] }}", "m['content'].split('|')[-1] }}"), [U("a < b | c")]),
    ],
)
def test_a_template_reads_what_people_wrote(template: str, messages: list[Message]) -> None:
    fed, whole = fed_and_whole(byte_tokenizer(template), messages)
    assert fed == whole

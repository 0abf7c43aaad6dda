"""A turn answered twice: what the history holds, and what the model would have said along the gold answer."""

from __future__ import annotations

import math

import pytest
import torch

from loopserve.api import Engine
from loopserve.bench.quality.conversation import Conversation, Distributions
from loopserve.core.errors import ModelError
from loopserve.models.layers import set_implementation
from tests.bench.quality.small import SNAPKV, random_model

GOLD = ("amber falcon river .", "stone .")
TEXTS = ("the code of lisbon is amber falcon river . what is the code of lisbon ?", "what is the code of paris ?")


def talk(stack: object = "dense") -> Conversation:
    engine = Engine(*random_model(), stack)  # type: ignore[arg-type]
    return Conversation(engine.token_engine, engine.tokenizer, engine.stop_ids)


def test_the_history_is_what_a_template_makes_of_gold_answers() -> None:
    _, tokenizer = random_model()
    dialogue = talk()
    for text, gold in zip(TEXTS, GOLD, strict=True):
        dialogue.ask(text, gold, 5)
    messages = [
        {"role": role, "content": content}
        for pair in zip(TEXTS, GOLD, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert dialogue.session.tokens == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_predictions_are_the_models_own_along_the_gold_answer() -> None:
    model, _ = random_model()
    dialogue = talk()
    answers = [dialogue.ask(text, gold, 5) for text, gold in zip(TEXTS, GOLD, strict=True)]
    ids = torch.tensor([dialogue.session.tokens])
    set_implementation(model, "eager")
    with torch.no_grad():
        logits = model(ids).logits[0]
    for answered, gold in zip(answers, GOLD, strict=True):
        said = dialogue.gold_tokens(gold)
        before = _find(dialogue.session.tokens, said) - 1
        wanted = logits[before : before + len(said)]
        torch.testing.assert_close(torch.stack(answered.predictions), wanted, atol=1e-4, rtol=1e-4)


def _find(tokens: list[int], part: list[int]) -> int:
    """Where an answer begins: the last place, since the first message states a code too."""
    return max(at for at in range(len(tokens)) if tokens[at : at + len(part)] == part)


def test_the_models_own_answer_is_the_same_whatever_gold_says() -> None:
    alone, beside = talk(SNAPKV).ask(TEXTS[0], None, 5), talk(SNAPKV).ask(TEXTS[0], GOLD[0], 5)
    assert alone.tokens == beside.tokens and alone.text == beside.text and alone.predictions == []
    silent = talk(SNAPKV).ask(TEXTS[0], GOLD[0], 5, generate=False)
    assert silent.tokens == [] and silent.stats.output_tokens == len(silent.predictions)


def test_an_empty_gold_answer_leaves_only_its_end() -> None:
    dialogue = talk()
    answered = dialogue.ask(TEXTS[0], "", 5)
    assert len(answered.predictions) == 1 and dialogue.session.tokens[-1] in dialogue.stop_ids
    dialogue.ask(TEXTS[1], GOLD[1], 5)


def test_divergence_is_zero_to_itself_and_what_torch_says_to_others() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 3, 50, generator=draw).mul(2).unbind(0)
    assert Distributions.of(list(ours)).divergences(list(ours)) == [0.0] * 3
    wanted = torch.nn.functional.kl_div(
        theirs.double().log_softmax(-1), ours.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(torch.tensor(Distributions.of(list(ours)).divergences(list(theirs))), wanted.float())


def test_what_is_no_number_is_no_agreement() -> None:
    dense = Distributions.of([torch.randn(20, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(ModelError, match="not numbers"):
        dense.divergences([torch.full((20,), float("nan"))])
    barred = torch.zeros(20)
    barred[3] = float("-inf")
    assert 0 < dense.divergences([barred])[0] < 100
    one = torch.full((20,), float("-inf"))
    one[3] = 0.0
    assert Distributions.of([one]).divergences([torch.zeros(20)])[0] == pytest.approx(math.log(20))


def test_a_large_vocabulary_is_measured_by_its_likeliest_tokens_from_below() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 9000, generator=draw).mul(3).unbind(0)
    whole = float(
        torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), reduction="sum", log_target=True)
    )
    (found,) = Distributions.of([ours]).divergences([theirs])
    assert 0.8 * whole < found <= whole
    assert Distributions.of([ours]).divergences([ours]) == [0.0]

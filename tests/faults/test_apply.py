"""The edges of ``loopserve.apply``: nesting, threads, caches of the caller's, masks, positions, interruptions, ways to generate."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import loopserve
from loopserve.core.errors import InputError, ModelError
from tests.faults.models import generated, ids, tiny, tokens

# From transformers 5.24 on the keyword is ``cache``; both are the caller's.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

SNAPKV = {"prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 16, "window": 4, "sink_tokens": 1}}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny()


def logits(model: PreTrainedModel, prompt: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(prompt, **options).logits
    return found


# One apply at a time.


def test_nested_is_refused_and_the_outer_goes_on(model: PreTrainedModel) -> None:
    plain = generated(model, ids(20), 4)
    with loopserve.apply(model, "dense"):
        with pytest.raises(ModelError, match="is served by loopserve already"), loopserve.apply(model, SNAPKV):
            pass
        assert generated(model, ids(20), 4) == plain
    with loopserve.apply(model, SNAPKV):
        pass
    assert generated(model, ids(20), 4) == plain


def test_closed_out_of_order(model: PreTrainedModel) -> None:
    other = tiny()
    before = (model.config._attn_implementation, len(model._forward_hooks), model.generate.__func__)
    first, second = ExitStack(), ExitStack()
    first.enter_context(loopserve.apply(model, "dense"))
    second.enter_context(loopserve.apply(other, SNAPKV))
    first.close()
    assert (model.config._attn_implementation, len(model._forward_hooks), model.generate.__func__) == before
    with pytest.raises(ModelError), loopserve.apply(other, "dense"):
        pass
    second.close()
    for each in (model, other):
        with loopserve.apply(each, "dense"):
            assert len(generated(each, ids(20), 3)) == 3


def test_an_apply_in_another_thread_is_refused(model: PreTrainedModel) -> None:
    said: list[BaseException] = []

    def other() -> None:
        try:
            with loopserve.apply(model, SNAPKV):
                pass
        except ModelError as error:
            said.append(error)

    with loopserve.apply(model, "dense"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "in whichever thread" not in str(said[0]) and "end that block first" in str(said[0])


def test_a_model_of_an_engine_is_refused(model: PreTrainedModel) -> None:
    from tests.faults.models import engine

    engine(model)
    with pytest.raises(ModelError, match="by an Engine"), loopserve.apply(model, "dense"):
        pass


def test_07_threads_in_one_apply_keep_to_themselves(model: PreTrainedModel) -> None:
    prompts = [ids(20 + 7 * number, number) for number in range(4)]
    found: dict[int, list[int]] = {}
    with loopserve.apply(model, SNAPKV):
        wanted = [generated(model, prompt, 8) for prompt in prompts]

        def run(number: int) -> None:
            found[number] = generated(model, prompts[number], 8)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[number] for number in range(4)] == wanted


def test_a_refused_apply_leaves_the_model_free(model: PreTrainedModel) -> None:
    stack = {
        "prefill": {"policy": "dense"},
        "decode": {"policy": "full"},
        "layers": [{"at": [9], "decode": {"policy": "snapkv"}}],
    }
    with pytest.raises(loopserve.LoopServeError), loopserve.apply(model, stack):
        pass
    with loopserve.apply(model, "dense"):
        assert len(generated(model, ids(9), 2)) == 2


# Caches of the caller's.


def test_no_cache_means_no_cache(model: PreTrainedModel) -> None:
    plain = generated(model, ids(20), 6)
    with loopserve.apply(model, "dense") as state:
        assert generated(model, ids(20), 6, use_cache=False) == plain
        assert len(state.stats[0]) == 1
        output = model(ids(20), use_cache=False) if torch.is_grad_enabled() is None else None
        assert output is None
        with torch.no_grad():
            assert model(ids(20), use_cache=False).past_key_values is None
            cache = model(ids(20)).past_key_values
            model(ids(3), use_cache=False, past_key_values=cache)
            assert cache.get_seq_length() == 20


def chat(model: PreTrainedModel) -> list[int]:
    """The usual loop: one cache of the caller's, the whole conversation each time."""
    cache, conversation, said = DynamicCache(config=model.config), ids(12), []
    for turn in range(3):
        length = conversation.shape[1]
        conversation = model.generate(
            conversation,
            attention_mask=torch.ones_like(conversation),
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
        )
        said += conversation[0, length:].tolist()
        conversation = torch.cat([conversation, ids(5, turn + 1)], dim=1)
    assert cache.get_seq_length() == 12 + 3 * 4 + 2 * 5 - 1
    return said


def test_02_an_own_empty_cache_fills(model: PreTrainedModel) -> None:
    plain = chat(model)
    with loopserve.apply(model, "dense") as state:
        assert chat(model) == plain
        assert [turn.turn for turn in state.stats[0]] == [0, 1, 2]


def test_02_an_own_loop_token_by_token(model: PreTrainedModel) -> None:
    def run() -> list[int]:
        cache, found, waiting = DynamicCache(config=model.config), [], ids(20)
        for _ in range(6):
            waiting = logits(model, waiting, past_key_values=cache, use_cache=True)[:, -1:].argmax(-1)
            found.append(int(waiting))
        return found

    plain = run()
    with loopserve.apply(model, "dense") as state:
        assert run() == plain
        assert (len(state.stats[0]), state.stats[0][0].decode_steps) == (1, 5)


def test_10_a_copied_prompt_cache(model: PreTrainedModel) -> None:
    with loopserve.apply(model, SNAPKV), torch.no_grad():
        prompt = model(ids(30)).past_key_values
        answers = []
        for number in (1, 2, 1):
            cache = copy.deepcopy(prompt)
            whole = torch.cat([ids(30), ids(6, number)], dim=1)
            answers.append(generated(model, whole, 5, past_key_values=cache))
        assert answers[0] == answers[2] != answers[1]
        assert prompt.get_seq_length() == 30


def test_a_cache_that_holds_foreign_pairs_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, ids(9), past_key_values=cache)
    with loopserve.apply(model, "dense"), pytest.raises(ModelError, match="DynamicCache cannot be used"):
        logits(model, ids(3), past_key_values=cache)


def test_a_cache_after_the_block_is_refused_by_name(model: PreTrainedModel) -> None:
    with loopserve.apply(model, "dense"), torch.no_grad():
        cache = model(ids(9)).past_key_values
    with pytest.raises(ModelError, match=r"go on with it inside loopserve\.apply"):
        logits(model, ids(3), past_key_values=cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_cache_after_an_interrupted_pass_is_refused(model: PreTrainedModel, error: type[BaseException]) -> None:
    def stops(*_: Any) -> None:
        raise error("stop")

    with loopserve.apply(model, "dense"), torch.no_grad():
        cache = model(ids(9)).past_key_values
        handle = model.model.layers[1].register_forward_pre_hook(stops)
        with pytest.raises(error, match="stop"):
            model(ids(3), past_key_values=cache)
        handle.remove()
        with pytest.raises(InputError, match="was interrupted"):
            model(ids(3), past_key_values=cache)
        assert len(generated(model, ids(9), 3)) == 3


# Masks and positions.


def test_a_mask_over_cached_columns_must_be_the_same(model: PreTrainedModel) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with loopserve.apply(model, "dense"), torch.no_grad():
        cache = model(ids(6), attention_mask=mask).past_key_values
        with pytest.raises(ModelError, match="hides or shows tokens that are cached already"):
            model(ids(1), attention_mask=torch.ones(1, 7, dtype=torch.long), past_key_values=cache)
        cache = model(ids(6), attention_mask=mask).past_key_values
        longer = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
        found = model(ids(1, 1), attention_mask=longer, past_key_values=cache).logits
        with pytest.raises(ModelError, match="attention_mask has 5 columns"):
            model(ids(1), attention_mask=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    plain = DynamicCache(config=model.config)
    logits(model, ids(6), attention_mask=mask, past_key_values=plain)
    assert torch.allclose(found, logits(model, ids(1, 1), attention_mask=longer, past_key_values=plain), atol=1e-4)


def test_a_mask_with_a_hole_needs_positions_that_count_its_tokens(model: PreTrainedModel) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    with loopserve.apply(model, "dense"):
        with pytest.raises(ModelError, match="a mask with a hole"):
            logits(model, ids(8), attention_mask=mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = logits(model, ids(8), attention_mask=mask, position_ids=positions)
    alone = logits(model, ids(8)[mask.bool()][None])
    assert torch.allclose(found[mask.bool()], alone[0], atol=1e-4)


@pytest.mark.parametrize("counted", ["columns", "tokens"])
def test_positions_by_columns_or_by_tokens(model: PreTrainedModel, counted: str) -> None:
    mask = torch.tensor([[0] * 5 + [1] * 9])
    positions = None if counted == "columns" else (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask} | ({} if positions is None else {"position_ids": positions})
    plain = logits(model, ids(14), **options)
    with loopserve.apply(model, "dense"):
        assert torch.allclose(logits(model, ids(14), **options)[:, 5:], plain[:, 5:], atol=1e-4)


@pytest.mark.parametrize("positions", [[0, 1, 2, 2, 3], [4, 3, 2, 1, 0], [0, 1, 2, 0, 1]])
def test_positions_that_do_not_follow_are_refused(model: PreTrainedModel, positions: list[int]) -> None:
    with loopserve.apply(model, "dense"), pytest.raises(ModelError, match="position_ids must follow each other"):
        logits(model, ids(5), position_ids=torch.tensor([positions]))


def test_positions_of_one_kind_given_three_times(model: PreTrainedModel) -> None:
    with loopserve.apply(model, "dense"):
        plain = logits(model, ids(5))
        assert torch.equal(logits(model, ids(5), position_ids=torch.arange(5).expand(3, 1, 5)), plain)
        with pytest.raises(ModelError, match="places in an image"):
            logits(model, ids(5), position_ids=torch.stack([torch.arange(5), torch.arange(5) * 2])[:, None])


# Ways to generate.


def test_a_prompt_in_chunks_is_one_turn(model: PreTrainedModel) -> None:
    with loopserve.apply(model, SNAPKV) as state:
        wanted = generated(model, ids(40), 8)
        found = generated(model, ids(40), 8, prefill_chunk_size=16)
        assert len(state.stats[0]) == 1
        assert state.stats[0][0].as_dict()["prompt_tokens"] == 40
        assert state.stats[0][0].decode_steps == 7
    assert len(found) == len(wanted) == 8
    plain = generated(model, ids(40), 8)
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(40), 8, prefill_chunk_size=16) == plain


def test_a_single_new_token_is_a_turn(model: PreTrainedModel) -> None:
    def two() -> list[int]:
        first = model.generate(ids(20), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        # The last answer token is not cached yet, so the second turn is one cached answer behind; feed it and one more.
        longer = torch.cat([first.sequences[:, :-1], ids(1, 5)], dim=1)
        return generated(model, longer, 4, past_key_values=first.past_key_values)

    plain = two()
    with loopserve.apply(model, "dense") as state:
        assert two() == plain
        assert [turn.as_dict()["prompt_tokens"] for turn in state.stats[0]] == [20, 1]


@pytest.mark.parametrize("stack", ["dense", SNAPKV], ids=["dense", "snapkv"])
def test_beams_and_several_answers(model: PreTrainedModel, stack: Any) -> None:
    batch = torch.cat([ids(15), ids(15, 1)])
    mask = torch.ones_like(batch)

    def said(**options: Any) -> list[list[int]]:
        torch.manual_seed(0)
        found = model.generate(batch, attention_mask=mask, max_new_tokens=5, **options)
        answers: list[list[int]] = found.tolist()
        return answers

    ways: list[dict[str, Any]] = [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 2, "do_sample": True},
    ]
    plain = [said(**way) for way in ways]
    with loopserve.apply(model, stack):
        found = [said(**way) for way in ways]
    if stack == "dense":
        assert found == plain
    assert [len(each) for each in found] == [len(each) for each in plain]


def test_tokens_beside_a_mask_of_ones_and_without(model: PreTrainedModel) -> None:
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(9), 3) == generated(
            model, ids(9), 3, attention_mask=torch.ones(1, 9, dtype=torch.long)
        )
    assert tokens(9) == ids(9)[0].tolist()

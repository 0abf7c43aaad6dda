"""A stack on a plain transformers model: same tokens, padded or not, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

import loopserve
from loopserve.core.errors import InputError, ModelError
from loopserve.models.tiny import VOCABULARY, tiny_model

# From transformers 5.24 on the keyword is ``cache``; both are the caller's.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

SPARSE = {
    "prefill": {
        "policy": "loopserve",
        "alpha": 0.8,
        "min_new_tokens": 8,
        "min_total_tokens": 16,
        "sample_rows": 16,
        "local_window": 2,
        "dense_above": 1.0,
    },
    "decode": {"policy": "snapkv", "budget": 16, "window": 4, "sink_tokens": 1},
}
LENGTHS = (40, 23, 57)


def rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(prompts: list[list[int]], left: bool = True) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        filler = [0] * (longest - len(prompt))
        ids.append(filler + prompt if left else prompt + filler)
        mask.append([0] * len(filler) + [1] * len(prompt) if left else [1] * len(prompt) + [0] * len(filler))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def answers(model: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    output = model.generate(**batch, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)
    return output[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("stack", ["dense", SPARSE], ids=["dense", "sparse"])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(family: str, stack: Any) -> None:
    model = tiny_model(family)
    with loopserve.apply(model, stack):
        together = answers(model, padded(rows()))
        alone = [answers(model, padded([prompt]))[0] for prompt in rows()]
    assert together == alone


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_dense_under_apply_equals_plain_generate(family: str) -> None:
    model = tiny_model(family)
    plain = answers(model, padded(rows()))
    with loopserve.apply(model, "dense"):
        assert answers(model, padded(rows())) == plain
    assert answers(model, padded(rows())) == plain


def test_beam_search_equals_plain(llama: PreTrainedModel) -> None:
    plain = answers(llama, padded(rows()[:1]), num_beams=3)
    with loopserve.apply(llama, "dense"):
        assert answers(llama, padded(rows()[:1]), num_beams=3) == plain


def test_a_second_turn_goes_on_with_the_returned_cache(llama: PreTrainedModel) -> None:
    def two_turns() -> list[int]:
        first = llama.generate(**padded(rows()[:1]), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([rows(1)[1]])], dim=1)
        more = llama.generate(ids, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False)
        return more[0].tolist()

    plain = two_turns()
    with loopserve.apply(llama, "dense") as state:
        assert two_turns() == plain
        assert [turn.turn for turn in state.stats[0]] == [0, 1]


def test_everything_is_undone_at_exit_even_after_an_error(llama: PreTrainedModel) -> None:
    before = (llama.config._attn_implementation, len(llama._forward_hooks), len(llama._forward_pre_hooks))
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}

    def breaks() -> None:
        with loopserve.apply(llama, SPARSE):
            answers(llama, padded(rows()))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        breaks()
    assert (llama.config._attn_implementation, len(llama._forward_hooks), len(llama._forward_pre_hooks)) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in llama.state_dict().items())


def test_a_sparse_stack_really_attends_to_less(llama: PreTrainedModel) -> None:
    with loopserve.apply(llama, SPARSE) as state:
        answers(llama, padded(rows()))
    for turns in state.stats:
        figures = turns[0].as_dict()
        assert figures["attended_fraction"] < 1.0
        assert figures["compressed_share"] > 0.5


def test_realised_coverage_is_measured_when_asked(llama: PreTrainedModel) -> None:
    figures = {}
    for name, stack in {"dense": "dense", "sparse": SPARSE}.items():
        with loopserve.apply(llama, stack, measure_coverage=True) as state:
            answers(llama, padded(rows()[:1]))
        figures[name] = state.stats[0][0].as_dict()
    assert figures["dense"]["coverage_realised"] == 1.0
    assert 0.5 < figures["sparse"]["coverage_realised"] < 1.0
    assert abs(figures["sparse"]["coverage_realised"] - figures["sparse"]["coverage_estimated"]) < 0.2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "2-D padding mask"),
        ({"inputs_embeds": torch.zeros(1, 5, 48), "input_ids": None}, "needs input_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(llama: PreTrainedModel, options: dict[str, Any], says: str) -> None:
    named = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]]), **options}
    with loopserve.apply(llama, SPARSE), torch.no_grad(), pytest.raises(ModelError, match=says):
        llama(**named)


def test_figures_are_reported_per_layer_and_head(llama: PreTrainedModel) -> None:
    with loopserve.apply(llama, SPARSE, measure_coverage=True) as state:
        answers(llama, padded(rows()[:1]))
    (turn,) = state.stats[0]
    figures = turn.head_figures()
    assert set(figures) == {0, 1, 2}
    for name in ("lines", "prefill_cell_density", "prefill_tile_density", "coverage_estimated", "coverage_realised"):
        per_head = [value for layer in figures.values() for value in layer[name]]
        assert len(per_head) == 3 * 4
        assert sum(per_head) / len(per_head) == pytest.approx(turn.means[name].value, rel=1e-6)


def test_a_static_cache_is_refused(llama: PreTrainedModel) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with loopserve.apply(llama, "dense"), torch.no_grad(), pytest.raises(ModelError, match="StaticCache"):
        llama(torch.tensor([[3, 4, 5]]), past_key_values=cache)


def test_a_cache_of_another_batch_is_refused(llama: PreTrainedModel) -> None:
    with loopserve.apply(llama, "dense"), torch.no_grad():
        cache = llama(torch.tensor([[3, 4, 5]])).past_key_values
        with pytest.raises(InputError, match="1 rows, the batch has 2"):
            llama(torch.tensor([[3], [4]]), past_key_values=cache)


def test_a_cache_made_under_another_stack_is_refused(llama: PreTrainedModel) -> None:
    with loopserve.apply(llama, SPARSE), torch.no_grad():
        cache = llama(torch.tensor([[3, 4, 5]])).past_key_values
    with loopserve.apply(llama, "dense"), torch.no_grad(), pytest.raises(ModelError, match="another stack or model"):
        llama(torch.tensor([[6]]), past_key_values=cache)


def test_training_is_refused(llama: PreTrainedModel) -> None:
    with loopserve.apply(llama, "dense"), pytest.raises(ModelError, match="for inference"):
        llama(torch.tensor([[3, 4, 5]]))

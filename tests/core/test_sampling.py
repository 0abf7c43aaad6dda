"""Drawing tokens: greedy by default, as transformers draws where options say so, repeatable, never from numbers that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import generation

from loopserve.core.engine.sampling import Dictation, Sampler, SamplingConfig, candidates, largest, read_sampling
from loopserve.core.errors import ConfigError, InputError, ModelError

LOGITS = torch.tensor([0.0, 3.0, 1.0, 3.0, -2.0])
VOCABULARY = 50


def random_logits(seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(SamplingConfig())(LOGITS) == 1


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-45}, {"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_extreme_options_draw_the_likeliest(extreme: dict[str, float]) -> None:
    assert Sampler(SamplingConfig(seed=0, **extreme))(LOGITS) in (1, 3)
    with pytest.raises(ValueError, match="seed"):
        SamplingConfig(seed=2**70)


@given(st.integers(0, 10_000))
def test_draws_are_repeatable_and_inside_what_was_asked(seed: int) -> None:
    config = SamplingConfig(temperature=2.0, top_k=3, seed=seed)
    drawn = [Sampler(config)(LOGITS) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0] in {1, 3, 2}
    assert Sampler(SamplingConfig(temperature=0.5, top_p=0.4, seed=seed))(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0.0, math.nan], "not numbers"),
        ([math.nan, 0.0], "not numbers"),
        ([0.0, math.inf], "infinity"),
        ([-math.inf, -math.inf], "all -inf"),
    ],
)
def test_logits_that_are_no_numbers_are_named(temperature: float, row: list[float], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Sampler(SamplingConfig(temperature=temperature))(torch.tensor(row))


def test_a_token_of_minus_infinity_is_never_drawn() -> None:
    sampler = Sampler(SamplingConfig(temperature=50.0, seed=1))
    assert {sampler(torch.tensor([-math.inf, 0.0, -math.inf, 0.0])) for _ in range(50)} == {1, 3}


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    st.sampled_from([0, 1, 7, 49, 500]),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
def test_what_may_be_drawn_is_what_transformers_keeps(
    seed: int, temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    logits = random_logits(seed)
    config = SamplingConfig(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    steps: list[Any] = [generation.TemperatureLogitsWarper(temperature)]
    steps += [generation.MinPLogitsWarper(min_p)] if min_p else []
    steps += [generation.TopKLogitsWarper(top_k)] if top_k else []
    steps += [generation.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits[None]
    for each in steps:
        scores = each(torch.tensor([[0]]), scores)
    ids, probabilities = candidates(logits, config)
    ours = torch.zeros(VOCABULARY, dtype=torch.float64).index_add(0, ids, probabilities)
    torch.testing.assert_close(ours, scores[0].softmax(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_transformers(top_p: float, spread: float) -> None:
    logits = random_logits(9, vocabulary=5000) * spread
    ids, probabilities = candidates(logits, SamplingConfig(temperature=1.0, top_p=top_p))
    ours = torch.zeros(5000, dtype=torch.float64).index_add(0, ids, probabilities)
    scores = generation.TopPLogitsWarper(top_p)(torch.tensor([[0]]), logits[None])
    torch.testing.assert_close(ours, scores[0].softmax(0), atol=1e-9, rtol=0)


def test_draws_follow_the_probabilities() -> None:
    logits = random_logits(3, vocabulary=6) / 2
    sampler = Sampler(SamplingConfig(temperature=1.5, seed=0))
    found = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=6) / 4000
    assert float((found - (logits / 1.5).softmax(0)).abs().max()) < 0.03


@given(st.integers(0, 1000), st.sampled_from([0.7, 1.0001, 1.3, 5.0]))
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(seed: int, penalty: float) -> None:
    prompt = torch.randint(VOCABULARY, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    sampler = Sampler(SamplingConfig(repetition_penalty=penalty), prompt)
    processor = generation.RepetitionPenaltyLogitsProcessor(penalty)
    ids = list(prompt)
    for step in range(8):
        logits = random_logits(1000 * seed + step)
        wanted = int(processor(torch.tensor([ids]), logits[None].clone()).argmax())
        ids.append(sampler(logits))
        assert ids[-1] == wanted


def test_bias_is_that_of_transformers_and_moves_the_choice() -> None:
    logits = random_logits(4)
    bias = {0: 7.5, 11: -100.0, 49: 2.0}
    wanted = generation.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(
        torch.tensor([[1]]), logits[None].float()
    )
    adjusted = Sampler(SamplingConfig(logit_bias=bias))._adjust(logits)
    torch.testing.assert_close(adjusted.float(), wanted[0])
    assert Sampler(SamplingConfig(logit_bias={4: 100}))(LOGITS) == 4
    assert Sampler(SamplingConfig(logit_bias={1: -100, 3: -100}))(LOGITS) == 2
    with pytest.raises(ConfigError, match="token 5 is not in the vocabulary of 5 tokens"):
        Sampler(SamplingConfig(logit_bias={5: 1}))(LOGITS)


def test_frequency_and_presence_count_the_answer_alone() -> None:
    sampler = Sampler(SamplingConfig(frequency_penalty=0.5, presence_penalty=0.25), prompt=[1, 1, 1, 3])
    assert [sampler(LOGITS) for _ in range(5)] == [1, 3, 1, 3, 1]
    scores = sampler._adjust(LOGITS)
    assert scores.tolist() == [0.0, 3.0 - 3 * 0.5 - 0.25, 1.0, 3.0 - 2 * 0.5 - 0.25, -2.0]


def test_bias_and_penalties_come_before_processors_and_these_before_the_temperature() -> None:
    seen = []

    def watch(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((input_ids.tolist(), scores.tolist()))
        return scores

    config = SamplingConfig(logit_bias={0: 4.0}, repetition_penalty=2.0, temperature=1e-9, seed=0)
    sampler = Sampler(config, [0, 4], [watch])
    drawn = [sampler(LOGITS), sampler(LOGITS)]
    assert set(drawn) <= {1, 3} and seen[0] == ([[0, 4]], [[2.0, 3.0, 1.0, 3.0, -4.0]])
    assert seen[1][0] == [[0, 4, drawn[0]]]


def test_processors_of_transformers_are_taken() -> None:
    prompt = [3, 7, 7, 12]
    config = SamplingConfig(temperature=0.8, seed=5)
    theirs = Sampler(
        config,
        prompt,
        [generation.RepetitionPenaltyLogitsProcessor(1.4), generation.SuppressTokensLogitsProcessor([2, 9])],
    )
    ours = Sampler(config.model_copy(update={"repetition_penalty": 1.4}), prompt)
    ours_too = []
    for step in range(20):
        logits = random_logits(step).float()
        ours_too.append(ours(logits.index_fill(0, torch.tensor([2, 9]), -math.inf)))
        assert theirs(logits) == ours_too[-1]
    blocked = Sampler(SamplingConfig(), [1, 2], [generation.NoRepeatNGramLogitsProcessor(2)])
    assert [blocked(torch.eye(4)[2]) for _ in range(4)] == [2, 0, 2, 1]


def raising(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise KeyError("vowels")


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (raising, "logits processor raising raised KeyError: 'vowels'"),
        (lambda ids, scores: None, "must return scores of shape .1, 5., got NoneType"),
        (lambda ids, scores: scores[0], "must return scores of shape .1, 5., got shape .5."),
        (lambda ids, scores: scores - math.inf, "allows no token"),
        (lambda ids, scores: scores * math.nan, "returned NaN"),
    ],
)
def test_a_processor_that_does_wrong_is_named(processor: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Sampler(SamplingConfig(), [], [processor])(LOGITS)


def test_a_processor_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        Sampler(SamplingConfig(), [], ["nucleus"])  # type: ignore[list-item]


def test_the_models_logits_are_left_as_they_are() -> None:
    def greedy_for(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        input_ids.zero_()
        return scores.fill_(-1.0)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = LOGITS.to(dtype)
        assert Sampler(SamplingConfig(), [3], [greedy_for])(logits) == 0
        Sampler(SamplingConfig(logit_bias={1: 5}, repetition_penalty=2, presence_penalty=1), [3])(logits)
        assert torch.equal(logits, LOGITS.to(dtype))


def test_logprobs_are_the_models_own() -> None:
    config = SamplingConfig(temperature=0.5, logit_bias={4: 100}, logprobs=True, top_logprobs=3, seed=0)
    sampler = Sampler(config)
    assert sampler(LOGITS) == 4
    wanted = LOGITS.double().log_softmax(0)
    (found,) = sampler.logprobs
    assert found.token_id == 4 and found.logprob == pytest.approx(float(wanted[4]))
    assert [token for token, _ in found.top] == [1, 3, 2]
    assert [value for _, value in found.top] == pytest.approx([float(wanted[token]) for token in (1, 3, 2)])
    alone = Sampler(SamplingConfig(logprobs=True))
    alone(LOGITS)
    assert alone.logprobs[0].top == () and Sampler(SamplingConfig()).logprobs == []


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 40))
def test_the_largest_are_in_order_and_of_equals_the_first(values: list[int], count: int) -> None:
    found = largest(torch.tensor(values, dtype=torch.float64), count).tolist()
    assert found == sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def test_dictation_says_what_is_written() -> None:
    assert [Dictation([4, 2])(LOGITS)] == [4]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_q": 1}, "unknown sampling option 'top_q'; did you mean 'top_p'.*known: .*min_p.*top_p"),
        ({"max_tokens": 1}, "did you mean 'max_new_tokens'"),
        ({"temperature": math.nan}, "temperature: .*finite number"),
        ({"temperature": -0.1}, "temperature: .*greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: .*valid number"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": True}, "top_k: a number is needed"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, r"logit_bias\.3"),
        ({"logit_bias": {3: math.nan}}, r"logit_bias\.3"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, r"stop\.1"),
        ({"stop": [3]}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=True"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_sampling(options)
    assert "\n" not in str(caught.value)


def test_options_are_read_as_people_write_them() -> None:
    config = read_sampling({"stop": "end", "logit_bias": {"3": 5}, "top_k": 4})
    assert config.stop == ("end",) and config.logit_bias == {3: 5.0} and config.top_k == 4
    assert read_sampling({"stop": None}).stop == () and read_sampling({"stop": ["a", "b"]}).stop == ("a", "b")

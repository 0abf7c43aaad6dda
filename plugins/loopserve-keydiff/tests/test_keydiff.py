import torch
from loopserve_keydiff import BareKeyDiffDecode, loopserve_register_policies

from loopserve import AttentionInputs, LayerSpec, LayerType, Phase, Registry
from loopserve.core.engine.stats import TurnStats
from loopserve.testing import parametrize_with_policy_checks


def inputs(keys: torch.Tensor, first_valid: torch.Tensor | None = None) -> AttentionInputs:
    heads, tokens, width = keys.shape
    return AttentionInputs(
        queries=torch.zeros(heads, tokens, width, dtype=torch.float32),
        keys=keys,
        values=keys,
        columns=torch.arange(tokens),
        positions=torch.arange(tokens),
        first_valid=first_valid,
        layer=LayerSpec(0, LayerType.FULL, heads, heads, width),
        phase=Phase.PREFILL,
        turn=0,
        turn_start=0,
        output_index=0,
        final=True,
        scaling=1.0,
        softcap=None,
        record=TurnStats(0),
    )


def test_the_odd_key_scores_highest():
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [5.0, 0.0]]])
    scores = BareKeyDiffDecode().score(inputs(keys))
    assert scores.shape == (1, 4) and int(scores.argmax()) == 2


def test_score_is_the_paper_s_formula_and_ignores_the_length_of_keys():
    keys = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    mean = (keys / keys.norm(dim=-1, keepdim=True)).mean(dim=1, keepdim=True)
    expected = -(keys * mean).sum(-1) / (keys.norm(dim=-1) * mean.norm(dim=-1))
    policy = BareKeyDiffDecode()
    torch.testing.assert_close(policy.score(inputs(keys)), expected)
    torch.testing.assert_close(policy.score(inputs(keys * torch.rand(2, 9, 1).add(0.5))).argsort(), expected.argsort())


def test_filler_columns_do_not_count():
    keys = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    filled = torch.cat([torch.full((1, 2, 4), 100.0, dtype=keys.dtype), keys], dim=1)
    scores = BareKeyDiffDecode().score(inputs(filled, first_valid=torch.tensor([2])))
    torch.testing.assert_close(scores[:, 2:], BareKeyDiffDecode().score(inputs(keys)))


def test_it_registers():
    registry = Registry()
    loopserve_register_policies(registry)
    assert [each.name for each in registry] == ["keydiff_bare"]


@parametrize_with_policy_checks([BareKeyDiffDecode])
def test_conformance(policy, check):
    check(policy)

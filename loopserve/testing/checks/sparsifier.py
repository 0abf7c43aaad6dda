"""Check a prefill sparsifier. Most checks use a first turn; histories and evictions have checks of their own."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.layers import Need
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.testing.checks.compressor import written_and_read
from loopserve.testing.inputs import make_inputs
from loopserve.testing.subject import NotApplicable, Subject, leaves_something_out, widest

NEW = 48
_TOLERANCE = 1e-4
_FILLER = 3  # columns that the last KV head does not hold, where there has been a ragged eviction
_LOUD = 50.0  # replacement values of filler, which must have no effect


def first_turn(seed: int = 0) -> AttentionInputs:
    return make_inputs(new_tokens=NEW, total_tokens=NEW, seed=seed, structured=True)


def attended(pattern: AttentionPattern, inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Return the attention through a pattern: output ``[Hq, Tq, D]``, and the log-sum-exp with ``need_lse``."""
    return pattern.attend(
        inputs.queries,
        inputs.keys,
        inputs.values,
        scaling=inputs.scaling,
        softcap=inputs.softcap,
        first_valid=inputs.first_valid,
        **options,
    )


def _masked_scores(mask: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return scores ``[Hq, Tq, Tk]`` with minus infinity outside the mask; a row without any cell is NaN after a softmax."""
    keys = inputs.keys.repeat_interleave(inputs.group, 0)
    return (inputs.queries @ keys.mT * inputs.scaling).masked_fill(~mask, float("-inf"))


def _usable_mask(pattern: AttentionPattern, inputs: AttentionInputs) -> Tensor:
    mask = pattern.to_mask()
    if mask.shape != (len(inputs.queries), inputs.new_tokens, inputs.total_tokens):
        raise NotApplicable("the mask has the wrong size, see pattern_covers_the_block")
    return mask


def pattern_covers_the_block(subject: Subject) -> None:
    """Check that the pattern's size and mask are those of the call: query heads, new tokens, total tokens."""
    inputs = first_turn()
    pattern, wanted = subject.sparsifier.sparsify(inputs), (4, 48, 48)
    assert tuple(pattern.size) == wanted, f"size is {pattern.size}, the call's is {wanted}"
    assert tuple(pattern.to_mask().shape) == wanted, f"the mask is {list(pattern.to_mask().shape)}"


def pattern_is_causal(subject: Subject) -> None:
    """Check that no query attends to a key that comes after it."""
    inputs = first_turn()
    mask = _usable_mask(subject.sparsifier.sparsify(inputs), inputs)
    later = mask & (torch.arange(inputs.total_tokens, device="cpu") > inputs.columns[:, None])
    assert not later.any(), f"{int(later.sum())} cells lie in the future, the first at {later.nonzero()[0].tolist()}"


def every_query_sees_itself(subject: Subject) -> None:
    """Check that every query attends at least to its own key, so that no softmax is empty."""
    inputs = first_turn()
    mask = _usable_mask(subject.sparsifier.sparsify(inputs), inputs)
    own = mask[:, torch.arange(inputs.new_tokens, device="cpu"), inputs.columns]
    assert own.all(), f"{int((~own).sum())} queries do not see themselves, the first at {(~own).nonzero()[0].tolist()}"


def attend_equals_masked_attention(subject: Subject) -> None:
    """Check that attending through the pattern equals dense attention under the pattern's mask, to 1e-4 in float32."""
    inputs = first_turn()
    pattern = subject.sparsifier.sparsify(inputs)
    mask = _usable_mask(pattern, inputs)
    values = inputs.values.repeat_interleave(inputs.group, 0)
    expected = _masked_scores(mask, inputs).softmax(-1).nan_to_num() @ values
    worst = float((attended(pattern, inputs)[0] - expected).abs().max())
    assert worst <= _TOLERANCE, f"differs by {worst:.2g}"


def lse_is_that_of_the_mask(subject: Subject) -> None:
    """Check that the log-sum-exp that a pattern gives when asked is that of the scores under its mask."""
    inputs = first_turn()
    pattern = subject.sparsifier.sparsify(inputs)
    mask = _usable_mask(pattern, inputs)
    lse = attended(pattern, inputs, need_lse=True)[1]
    assert lse is not None, "asked for, but not given"
    worst = float((lse - _masked_scores(mask, inputs).logsumexp(-1)).abs().max())
    assert worst <= _TOLERANCE, f"differs by {worst:.2g}"


def rows_are_those_of_the_mask(subject: Subject) -> None:
    """Check that rows asked for by their columns are the same rows of the whole mask."""
    inputs = first_turn()
    pattern = subject.sparsifier.sparsify(inputs)
    wanted = torch.tensor([1, 17, 46], dtype=torch.long, device="cpu")
    assert torch.equal(pattern.rows(wanted), pattern.to_mask()[:, wanted]), "rows() and to_mask() disagree"


def density_counts_the_mask(subject: Subject) -> None:
    """Check that cell density is the share of causal cells inside the mask, and tile density lies between 0 and 1."""
    inputs = first_turn()
    pattern = subject.sparsifier.sparsify(inputs)
    counted = _usable_mask(pattern, inputs).tril().sum((1, 2)).float() / pattern.causal_pairs
    stated, tiles = pattern.cell_density(), pattern.tile_density()
    assert torch.allclose(stated, counted, atol=1e-5), f"says {stated.tolist()}, the mask says {counted.tolist()}"
    assert bool(((tiles > 0) & (tiles <= 1)).all()), f"tile density is {tiles.tolist()}"


def sparsity_is_in_effect(subject: Subject) -> None:
    """Check that a turn of 48 tokens is not computed densely, unless the policy is declared passive: dense patterns prove nothing."""
    if subject.policy.effective_capabilities.passive:
        raise NotApplicable("it declares that it leaves every layer as it is")
    assert leaves_something_out(subject.sparsifier), (
        "it computes nearly all of 48 tokens: give an object with smaller options, or declare it passive"
    )


def history_is_accepted(subject: Subject) -> None:
    """Check that a later turn of 20 tokens, and one of a single token, over a history get causal patterns of the right size."""
    for new in (20, 1):
        _assert_serves(subject, make_inputs(new_tokens=new, total_tokens=60, turn=1))


def gaps_in_positions_are_accepted(subject: Subject) -> None:
    """Check that after an eviction, where KV heads hold different positions, a turn gets a causal pattern of the right size."""
    _require_evictions(subject)
    _assert_serves(subject, make_inputs(new_tokens=20, total_tokens=60, turn=1, evicted=8))


def _require_evictions(subject: Subject) -> None:
    if Need.FULL_HISTORY in subject.policy.effective_capabilities.needs:
        raise NotApplicable("it needs the whole history, so nothing is ever evicted before it")


def _assert_serves(subject: Subject, inputs: AttentionInputs) -> None:
    pattern = subject.sparsifier.sparsify(inputs)
    mask, wanted = pattern.to_mask(), (4, inputs.new_tokens, inputs.total_tokens)
    assert tuple(mask.shape) == wanted, f"the mask is {list(mask.shape)}, the call is {list(wanted)}"
    assert not (mask & (torch.arange(inputs.total_tokens, device="cpu") > inputs.columns[:, None])).any(), (
        "attends to a later key"
    )
    assert mask[:, torch.arange(inputs.new_tokens, device="cpu"), inputs.columns].all(), (
        "a query does not attend to itself"
    )
    assert torch.isfinite(attended(pattern, inputs)[0]).all(), "the output is not finite"


def filler_is_never_attended(subject: Subject) -> None:
    """Check that the content of filler columns of a head that holds fewer pairs changes no output."""
    _require_evictions(subject)
    outputs = []
    for loud in (0.0, _LOUD):
        inputs = make_inputs(new_tokens=20, total_tokens=60, turn=1, evicted=8, ragged=_FILLER)
        inputs.keys[-1, :_FILLER] = loud
        inputs.values[-1, :_FILLER] = loud
        outputs.append(attended(subject.sparsifier.sparsify(inputs), inputs)[0])
    worst = float((outputs[0] - outputs[1]).abs().max())
    assert worst <= _TOLERANCE, f"the output differs by {worst:.2g} with what stands in filler"


def same_inputs_give_the_same_pattern(subject: Subject) -> None:
    """Check that equal inputs and seed give equal patterns, unless the policy declares that it is not deterministic."""
    if not subject.policy.effective_capabilities.deterministic:
        raise NotApplicable("it declares that it is not deterministic")
    one, two = (subject.sparsifier.sparsify(first_turn()).to_mask() for _ in range(2))
    assert torch.equal(one, two), "two calls with equal inputs gave two patterns"


def rows_of_a_batch_are_independent(subject: Subject) -> None:
    """Check that another conversation served in between changes nothing: each gets the pattern it gets alone."""
    alone = subject.sparsifier.sparsify(first_turn()).to_mask()
    if not torch.equal(alone, subject.sparsifier.sparsify(first_turn()).to_mask()):
        raise NotApplicable("it is not deterministic, so a difference would say nothing")
    subject.sparsifier.sparsify(first_turn(seed=1))
    assert torch.equal(alone, subject.sparsifier.sparsify(first_turn()).to_mask()), "another conversation shows through"


def sparsifier_state_survives_a_fork(subject: Subject) -> None:
    """Check that the state that the policy writes can be copied and written to disk, and the copies serve the next turn equally."""
    inputs = first_turn()
    subject.sparsifier.sparsify(inputs)
    if not inputs.state:
        raise NotApplicable("it keeps no state")
    masks = []
    for state in (copy.deepcopy(inputs.state), written_and_read(subject.policy, inputs.state), inputs.state):
        later = make_inputs(new_tokens=20, total_tokens=68, turn=1)
        later.state.update(state)
        masks.append(subject.sparsifier.sparsify(later).to_mask())
    assert torch.equal(masks[0], masks[2]), "the copy of the state leads to another pattern"
    assert torch.equal(masks[1], masks[2]), "the state read from disk leads to another pattern"


def widest_setting_is_dense(subject: Subject) -> None:
    """Check that with every share (above 0, at most 1) at 1 and every width beyond the conversation, all causal cells are in."""
    wide = widest(subject.policy)
    if wide is None:
        raise NotApplicable("it has no option for a share or a width")
    inputs = first_turn()
    left_out = (
        ~_usable_mask(Subject(wide).sparsifier.sparsify(inputs), inputs)
        & torch.ones(48, 48, dtype=torch.float32, device="cpu").tril().bool()
    )
    assert not left_out.any(), f"{int(left_out.sum())} causal cells are left out by {wide.config!r}"


def gpu_is_never_waited_for(subject: Subject) -> None:
    """Check that on a GPU, selection and attention are queued: nothing waits for the device."""
    if not torch.cuda.is_available():
        raise NotApplicable("there is no GPU")
    inputs = _on_gpu(make_inputs(new_tokens=256, total_tokens=1024, turn=1))
    attended(subject.sparsifier.sparsify(inputs), inputs)  # compiling and loading a kernel may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = replace(inputs, scratch={}, state={})  # the first call's cached results must not help the second
        attended(subject.sparsifier.sparsify(again), again)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _on_gpu(inputs: AttentionInputs) -> AttentionInputs:
    moved = {name: getattr(inputs, name).cuda() for name in ("queries", "keys", "values", "columns", "positions")}
    return replace(inputs, **moved)


CHECKS = (
    pattern_covers_the_block,
    pattern_is_causal,
    every_query_sees_itself,
    attend_equals_masked_attention,
    lse_is_that_of_the_mask,
    rows_are_those_of_the_mask,
    density_counts_the_mask,
    sparsity_is_in_effect,
    history_is_accepted,
    gaps_in_positions_are_accepted,
    filler_is_never_attended,
    same_inputs_give_the_same_pattern,
    rows_of_a_batch_are_independent,
    sparsifier_state_survives_a_fork,
    widest_setting_is_dense,
    gpu_is_never_waited_for,
)

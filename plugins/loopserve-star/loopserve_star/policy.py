"""Choose the blocks of Star Attention."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from loopserve import AttentionInputs, AttentionPattern, PolicyConfig, PrefillSparsifier
from loopserve_star.pattern import StarPattern


class StarPrefill(PrefillSparsifier):
    """Attend from each block of tokens to itself and to the conversation's first tokens; from a turn's last tokens to everything.

    Star Attention (https://arxiv.org/abs/2411.17116). Variant: its two phases in one call, the context in blocks behind
    an anchor and the query over everything; the paper's anchor is as long as a block.

    Deviations: blocks are cut at fixed columns of the conversation, not by spreading a prompt over hosts, so a block may
    be finished by a later turn. Keys stay at their own positions, where the paper gives each block a copy of the anchor.
    Which tokens are the query is not known here: the last ``last_rows`` of a turn are taken for it. They are computed in
    one softmax, which is what the paper's exchange of partial softmaxes gives.

    Multi-turn: the last tokens of a later turn see all of the history, its other tokens the anchor and their own block. After
    an eviction, blocks and anchor are counted over the pairs that are left.
    """

    name: ClassVar[str] = "star"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.17116"

    class Config(PolicyConfig):
        block_size: int = Field(1024, gt=0, description="Tokens of a block.")
        anchor_size: int = Field(1024, ge=0, description="First tokens of the conversation that every block sees.")
        last_rows: int = Field(64, ge=0, description="Last tokens of a turn that see everything.")

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return StarPattern(
            len(inputs.queries),
            inputs.new_tokens,
            inputs.total_tokens,
            block=self.config.block_size,
            anchor=self.config.anchor_size,
            whole=self.config.last_rows if inputs.final else 0,
        )

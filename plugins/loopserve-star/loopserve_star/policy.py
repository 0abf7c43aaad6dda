"""Choose the blocks of Star Attention."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from loopserve import AttentionInputs, AttentionPattern, PolicyConfig, PrefillSparsifier
from loopserve_star.pattern import StarPattern


class StarPrefill(PrefillSparsifier):
    """Attend from each block of tokens to itself and to the first tokens of the session; from a turn's last tokens to
    everything.

    Paper: Star Attention (https://arxiv.org/abs/2411.17116). Variant: both phases run in one call, the context in
    blocks after an anchor and the query over everything. The paper's anchor is as long as a block.

    Deviations: blocks have fixed columns of the session instead of being spread over hosts, so a later turn may
    complete a block. Keys keep their own positions, where the paper gives each block a copy of the anchor. The policy
    does not know which tokens are the query, so it takes the last ``last_rows`` of a turn. They are computed in one
    softmax, which equals the paper's exchange of partial softmaxes.

    Multi-turn: the last tokens of a later turn see the whole history, its other tokens the anchor and their own block.
    After an eviction, blocks and anchor are counted over the remaining pairs.
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

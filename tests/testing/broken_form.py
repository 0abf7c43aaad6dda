"""Policies that break one promise of form, or change what is not their own while they serve."""

from __future__ import annotations

import torch
from pydantic import ConfigDict, Field, field_validator

from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.layers import LayerType
from loopserve.core.policy.patterns import AttentionPattern
from tests.testing.honest import EveryOtherKey


class HyphenInItsName(EveryOtherKey):
    """Has a hyphen and a capital in its name."""

    name = "Every-other"


class SaysNothing(EveryOtherKey):
    """Undocumented."""


class PaperWithoutALink(EveryOtherKey):
    """Says which paper it is from, arXiv 2404.14469, but gives no link."""

    paper = "arXiv 2404.14469"


class LinkNotInItsDocstring(EveryOtherKey):
    """Has a link to a paper, which its docstring does not give."""

    paper = "https://arxiv.org/abs/2404.14469"


class AbleToDoMore(EveryOtherKey):
    """Claims, in an object, a layer type that its class does not declare."""

    @property
    def effective_capabilities(self) -> Capabilities:
        return Capabilities(layer_types=frozenset(LayerType))


class OptionsCanBeSet(EveryOtherKey):
    """Lets its options be changed while it serves."""

    class Config(EveryOtherKey.Config):
        model_config = ConfigDict(frozen=False)


class TakesAnyOption(EveryOtherKey):
    """Ignores options it does not know."""

    class Config(EveryOtherKey.Config):
        model_config = ConfigDict(extra="ignore")


class OptionWithoutMeaning(EveryOtherKey):
    """Has an option that says nothing about itself."""

    class Config(EveryOtherKey.Config):
        offset: int = 0


class CountsItsOptionUp(EveryOtherKey):
    """Adds one to an option each time it is read."""

    class Config(EveryOtherKey.Config):
        offset: int = Field(0, ge=0, description="Nothing depends on it.")

        @field_validator("offset")
        @classmethod
        def _one_more(cls, offset: int) -> int:
            return offset + 1


class CountsItsCalls(EveryOtherKey):
    """Counts its calls in itself."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self.calls: dict[int, int] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        self.calls[inputs.layer.index] = self.calls.get(inputs.layer.index, 0) + 1
        return super().sparsify(inputs)


class SeedsTheGlobalState(EveryOtherKey):
    """Seeds torch's global generator and draws from it."""

    def mask(self, inputs: AttentionInputs) -> torch.Tensor:
        torch.manual_seed(0)
        return super().mask(inputs) | (torch.rand(()) > 1)


class WritesIntoTheKeys(EveryOtherKey):
    """Doubles the keys in place, chooses, and halves them again."""

    def mask(self, inputs: AttentionInputs) -> torch.Tensor:
        inputs.keys.mul_(2)
        mask = super().mask(inputs)
        inputs.keys.div_(2)
        return mask


BROKEN = {
    "name_is_snake_case": HyphenInItsName,
    "docstring_says_what_it_does": SaysNothing,
    "paper_is_a_link_or_empty": PaperWithoutALink,
    "docstring_gives_the_link": LinkNotInItsDocstring,
    "capabilities_are_declared": AbleToDoMore,
    "config_is_frozen": OptionsCanBeSet,
    "unknown_options_are_refused": TakesAnyOption,
    "options_are_described": OptionWithoutMeaning,
    "options_survive_a_yaml_round_trip": CountsItsOptionUp,
    "policy_object_stays_as_it_is": CountsItsCalls,
    "random_state_is_left_alone": SeedsTheGlobalState,
    "inputs_stay_unchanged": WritesIntoTheKeys,
}

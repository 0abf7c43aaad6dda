"""Give policies access to parts of a transformers layer: its rotation by position, and its output weight.

The rotation is the model's own (its rotary module and its ``apply_rotary_pos_emb``), so it follows each family's convention. A
stack that needs an unavailable part is refused, with the reason, when it is loaded.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loopserve.core.policy.layers import LayerParts, Need

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense")
_QUERY_NAMES = ("q_proj", "qkv_proj", "q_b_proj", "query_key_value", "c_attn", "Wqkv")
_PROBED = (0, 1, 7, 300)  # positions at which a rotation is tried forwards and backwards
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class TransformersLayer(LayerParts):
    """Hold the parts of one attention module."""

    def __init__(self, module: torch.nn.Module, rotary: torch.nn.Module | None, layer_type: str, heads: int) -> None:
        self._module, self._rotary, self._layer_type, self._heads = module, rotary, layer_type, heads
        self._apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        self._reasons: dict[Need, str | None] = {}

    def lacks(self, need: Need) -> str | None:
        if need not in self._reasons:
            self._reasons[need] = self._no_rotation() if need is Need.ROTARY else self._no_output_weight()
        return self._reasons[need]

    def rotate(self, vectors: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        if not getattr(self._module, "use_rope", True):  # a layer without positions
            return vectors
        assert self._rotary is not None and self._apply is not None
        typed = "layer_type" in inspect.signature(self._rotary.forward).parameters
        extra = {"layer_type": self._layer_type} if typed else {}
        cos, sin = self._rotary(vectors[None], positions[None], **extra)
        if back:
            # A rotation scaled by s is undone by the inverse rotation scaled by 1 / s.
            square = (cos.float() ** 2 + sin.float() ** 2).mean()
            cos, sin = cos / square, -sin / square
        turned: Tensor = self._apply(vectors[None], vectors[None], cos, sin)[0][0]
        return turned

    def output_weight(self) -> Tensor:
        weight = self._output().weight
        whole: Tensor = weight.detach()
        return whole.T.reshape(self._heads, -1, whole.shape[0])

    def _output(self) -> Any:
        found = (getattr(self._module, name, None) for name in _OUTPUT_NAMES)
        return next((each for each in found if each is not None), None)

    def _is_offloaded(self) -> bool:
        """Return whether accelerate moves the weights to a device for each call only."""
        return any(hasattr(each, "_hf_hook") for each in self._module.modules())

    def _no_output_weight(self) -> str | None:
        output = self._output()
        weight = getattr(output, "weight", None)
        if weight is not None and weight.device.type == "meta" and self._is_offloaded():
            return f"the weights of {type(self._module).__name__} are offloaded (its device is 'meta')"
        if (
            not isinstance(weight, Tensor)
            or weight.dim() != 2
            or not weight.is_floating_point()
            or weight.shape[1] % self._heads
        ):
            return f"{type(self._module).__name__} has no plain linear {' or '.join(_OUTPUT_NAMES)}"
        return None

    def _no_rotation(self) -> str | None:
        name = type(self._module).__name__
        if self._rotary is None or self._apply is None:
            return f"{name} does not rotate by a rotary_emb and apply_rotary_pos_emb, or not in a way known here"
        if any(kind in str(getattr(self._rotary, "rope_type", "")) for kind in _LENGTH_DEPENDENT):
            return f"the rotation of {name} depends on the length of the conversation, so it cannot be undone later"
        held = [*self._module.parameters(), *self._module.buffers()]
        device = held[0].device if held else torch.device("cpu")
        if device.type == "meta" and not self._is_offloaded():
            return None  # a model on the meta device, whose rotation cannot be tried
        if device.type == "meta":
            return f"the weights of {name} are offloaded (its device is 'meta')"
        width = int(getattr(self._module, "head_dim", 0) or getattr(self._module, "head_size", 0))
        if not width:
            return f"{name} does not say the size of its heads"
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, len(_PROBED), width, generator=generator, dtype=torch.float32, device="cpu").to(device)
        positions = torch.tensor(_PROBED, dtype=torch.long, device=device)
        try:
            again = self.rotate(self.rotate(probe, positions), positions, back=True)
        except Exception as error:  # code of another family, which may not accept this call
            return f"the rotation of {name} cannot be called by itself ({type(error).__name__}: {error})"
        if again.shape != probe.shape or float((again - probe).abs().max()) > 1e-3:
            return f"the rotation of {name} could not be turned back"
        return None


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """Return the text decoder of a model, which may have other parts (vision, audio) beside it."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return found if isinstance(found, torch.nn.Module) else model


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """Return the attention module of each layer of the text decoder, by its index."""
    modules: dict[int, torch.nn.Module] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and any(hasattr(module, name) for name in _QUERY_NAMES):
            modules.setdefault(index, module)
    return modules


def layer_parts(model: PreTrainedModel, types: list[str], heads: int) -> dict[int, TransformersLayer]:
    """Return the parts of each attention layer by its index."""
    decoder = decoder_of(model)
    rotaries = [module for name, module in decoder.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    rotary = rotaries[0] if len(rotaries) == 1 else None
    return {
        index: TransformersLayer(module, rotary, types[index], heads)
        for index, module in attention_modules(model).items()
        if index < len(types)
    }

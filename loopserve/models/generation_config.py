"""Read the stop tokens and the sampling options of a model's ``generation_config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end an answer of the model."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def model_sampling(model: PreTrainedModel) -> dict[str, Any]:
    """Return the sampling options that the model's ``generation_config`` sets, by the names of ``SamplingConfig``.

    As in transformers, a model that does not set ``do_sample`` is greedy. A model that sets it without a temperature uses 1. The
    values are not checked.
    """
    config = model.generation_config
    if config is None:
        return {}
    options = {name: getattr(config, name) for name in _TAKEN if getattr(config, name, None) is not None}
    if not config.do_sample:
        options["temperature"] = 0.0
    else:
        options.setdefault("temperature", 1.0)
    return options

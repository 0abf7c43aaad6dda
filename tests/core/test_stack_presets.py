"""The presets as shipped, with the policies as shipped."""

import pytest

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.core.policy.registry import Registry
from loopserve.core.policy.wrappers import written
from loopserve.core.stack.config import parse_yaml, to_yaml
from loopserve.core.stack.stack import preset_file, preset_names, resolve_stack
from loopserve.core.stack.stack_file import read_stack
from loopserve.plugins import load_registry
from loopserve.testing.inputs import PlainParts

LAYERS = [LayerSpec(index, LayerType.FULL, 4, 2, 8, parts=PlainParts(4, 8)) for index in range(4)]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(disabled=[]).registry


def test_the_presets_that_are_promised_are_there():
    rivals = {"tri_shape", "minference", "flexprefill", "xattention", "topk_blocks", "sample_attention", "static_lines"}
    rivals |= {"flashprefill", "flashprefill-paper", "duo", "minference-paper", "a_shape-paper", "tri_shape-paper"}
    rivals |= {"h2o", "tova", "quest", "keydiff", "knorm", "lagkv", "expected_attention", "adakv", "adakv-evict"}
    rivals |= {
        "pyramidkv",
        "criticalkv",
        "chunkkv",
        "rocketkv_mt",
        "recover_alpha",
        "twilight",
        "omnikv",
        "rkv",
        "flowkv",
        "kvzip",
    }
    ablations = {"no-overlap", "last-rows", "length-cost", "active", "interval-1", "interval-8", "interval-64"}
    ablations |= {"first-last-window", "first-sampled", "first-dense"}
    assert rivals | {f"loopserve-{each}" for each in ablations} <= set(preset_names())
    promised = {"dense", "loopserve", "loopserve-paper", "snapkv", "snapkv-evict", "streaming_llm", "a_shape", "random"}
    assert promised <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_names_itself_and_fits_a_plain_model(name: str, registry: Registry):
    stack = resolve_stack(name, registry)
    assert stack.name == name and stack.description
    assert stack.source == f"preset {name}.yaml"
    stack.check(LAYERS, batch=True)
    assert resolve_stack(stack.describe(), registry) == stack
    again = read_stack(parse_yaml(to_yaml(stack.describe()), "again.yaml"), registry)
    assert (written(again.prefill), written(again.decode)) == (written(stack.prefill), written(stack.decode))


@pytest.mark.parametrize("name", preset_names())
def test_the_first_line_of_a_preset_names_the_paper(name: str):
    first = preset_file(name).read_text("utf-8").splitlines()[0]
    assert first.startswith("# ") and "https://arxiv.org/abs/" in first


def test_presets_do_different_things(registry: Registry):
    digests = [resolve_stack(name, registry).digest for name in preset_names()]
    assert len(set(digests)) == len(digests)


def test_presets_say_what_they_say(registry: Registry):
    assert resolve_stack("dense", registry).is_dense and not resolve_stack("snapkv", registry).is_dense
    assert resolve_stack("snapkv-evict", registry).decode.retention is Retention.EVICT
    for name in ("loopserve", "loopserve-paper"):
        stack = resolve_stack(name, registry)
        assert (stack.prefill.name, stack.decode.name) == ("loopserve", "loopserve")
        assert stack.decode.retention is Retention.KEEP

"""Register the methods that ship with loopserve, one file each. Cheap to import; torch is imported with the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopserve.core.policy.hookspecs import hookimpl

if TYPE_CHECKING:
    from loopserve.core.policy.registry import Registry


@hookimpl
def loopserve_register_policies(registry: Registry) -> None:
    from loopserve.policies.decode.adakv import AdaKVDecode
    from loopserve.policies.decode.chunkkv import ChunkKVDecode
    from loopserve.policies.decode.criticalkv import CriticalKVDecode
    from loopserve.policies.decode.duo import DuoDecode
    from loopserve.policies.decode.expected_attention import ExpectedAttentionDecode
    from loopserve.policies.decode.flowkv import FlowKVDecode
    from loopserve.policies.decode.full import FullDecode
    from loopserve.policies.decode.h2o import H2ODecode
    from loopserve.policies.decode.keydiff import KeyDiffDecode
    from loopserve.policies.decode.knorm import KnormDecode
    from loopserve.policies.decode.kvzip import KVzipDecode
    from loopserve.policies.decode.lagkv import LagKVDecode
    from loopserve.policies.decode.loopserve.policy import LoopServeDecode
    from loopserve.policies.decode.omnikv import OmniKVDecode
    from loopserve.policies.decode.pyramidkv import PyramidKVDecode
    from loopserve.policies.decode.quest import QuestDecode
    from loopserve.policies.decode.random import RandomDecode
    from loopserve.policies.decode.recover_alpha import RecoverAlphaDecode
    from loopserve.policies.decode.rkv import RKVDecode
    from loopserve.policies.decode.rocketkv_mt import RocketKVMTDecode
    from loopserve.policies.decode.snapkv import SnapKVDecode
    from loopserve.policies.decode.streaming_llm import StreamingLLMDecode
    from loopserve.policies.decode.tova import TOVADecode
    from loopserve.policies.decode.twilight import TwilightDecode
    from loopserve.policies.prefill.a_shape import AShapePrefill
    from loopserve.policies.prefill.dense import DensePrefill
    from loopserve.policies.prefill.duo import DuoPrefill
    from loopserve.policies.prefill.flashprefill import FlashPrefillPrefill
    from loopserve.policies.prefill.flexprefill import FlexPrefillPrefill
    from loopserve.policies.prefill.loopserve import LoopServePrefill
    from loopserve.policies.prefill.minference import MInferencePrefill
    from loopserve.policies.prefill.sample_attention import SampleAttentionPrefill
    from loopserve.policies.prefill.static_lines import StaticLinesPrefill
    from loopserve.policies.prefill.topk_blocks import TopKBlocksPrefill
    from loopserve.policies.prefill.tri_shape import TriShapePrefill
    from loopserve.policies.prefill.xattention import XAttentionPrefill

    for fixed in (DensePrefill, AShapePrefill, TriShapePrefill, MInferencePrefill, StaticLinesPrefill):
        registry.register(fixed)
    for found in (LoopServePrefill, FlexPrefillPrefill, XAttentionPrefill, TopKBlocksPrefill, SampleAttentionPrefill):
        registry.register(found)
    for scored in (
        SnapKVDecode,
        TOVADecode,
        H2ODecode,
        KnormDecode,
        KeyDiffDecode,
        LagKVDecode,
        ExpectedAttentionDecode,
        RKVDecode,
        KVzipDecode,
    ):
        registry.register(scored)
    for wrapper in (AdaKVDecode, PyramidKVDecode, CriticalKVDecode, ChunkKVDecode, FlowKVDecode, TwilightDecode):
        registry.register(wrapper)
    for other in (FullDecode, LoopServeDecode, StreamingLLMDecode, RandomDecode, QuestDecode, RocketKVMTDecode):
        registry.register(other)
    for more in (RecoverAlphaDecode, OmniKVDecode, FlashPrefillPrefill, DuoPrefill, DuoDecode):
        registry.register(more)

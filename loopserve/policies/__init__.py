"""The built-in plugin: every method that ships with loopserve, one file each. Cheap to import; torch comes with the
classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopserve.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from loopserve.core.registry import Registry


@hookimpl
def loopserve_register_policies(registry: Registry) -> None:
    from loopserve.policies.decode.full import FullDecode
    from loopserve.policies.decode.loopserve import LoopServeDecode
    from loopserve.policies.decode.random import RandomDecode
    from loopserve.policies.decode.snapkv import SnapKVDecode
    from loopserve.policies.decode.streaming_llm import StreamingLLMDecode
    from loopserve.policies.prefill.a_shape import AShapePrefill
    from loopserve.policies.prefill.dense import DensePrefill
    from loopserve.policies.prefill.loopserve import LoopServePrefill

    for policy in (DensePrefill, LoopServePrefill, AShapePrefill):
        registry.register(policy)
    for compressor in (FullDecode, LoopServeDecode, SnapKVDecode, StreamingLLMDecode, RandomDecode):
        registry.register(compressor)

"""Collect the checks of the conformance kit, one function and one sentence each; about thirty apply to a policy."""

from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.testing.checks import compressor, policy, sparsifier
from loopserve.testing.subject import Check

CHECKS: tuple[Check, ...] = (
    *(Check(each, None) for each in policy.CHECKS),
    *(Check(each, PrefillSparsifier) for each in sparsifier.CHECKS),
    *(Check(each, DecodeCompressor) for each in compressor.CHECKS),
)

"""Make the same policy under other options: small enough for a few dozen tokens, evicting, or as wide as possible.

The options' types, bounds and usual names determine the changes, so that unknown policies can be tested as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from loopserve.core.errors import ConfigError
from loopserve.core.policy.interfaces import DecodeCompressor, PolicyConfig, PrefillSparsifier, Retention
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.testing.inputs import make_inputs

AnyPolicy = PrefillSparsifier | DecodeCompressor[Any]
AnyPolicyClass = type[PrefillSparsifier] | type[DecodeCompressor[Any]]

WIDE = 4096  # more tokens than any conversation of the kit has
_LARGE, _MIDDLING = 512, 16
_SPARSE = 0.9  # share of the causal cells below which a pattern counts as sparse
_WIDTHS = ("budget", "window", "_size", "last_rows")  # suffixes of options that set a number of tokens


def small(policy: AnyPolicyClass) -> AnyPolicy:
    """Return a policy of this class that is active on a few dozen tokens: budgets of about 24, windows of about 4.

    A sparsifier's options are reduced, and a share lowered or set to 1, until a turn of 48 tokens is sparse: most
    checks prove nothing on a dense pattern. Raises ConfigError if no object can be made.
    """
    first: AnyPolicy | None = None
    make = policy_maker(policy)
    for options in _smaller(policy):
        made = make(options)
        if made is not None and (not isinstance(made, PrefillSparsifier) or leaves_something_out(made)):
            return made
        first = first or made
    if first is None:
        raise ConfigError(
            f"{policy.__module__}.{policy.__qualname__} cannot be made without options of its own: "
            "give the check an object instead of the class"
        )
    return first


def policy_maker(policy: AnyPolicyClass) -> Callable[[dict[str, Any]], AnyPolicy | None]:
    """Return a function that makes a policy from options, or None where they are incompatible.

    Raises ConfigError for an error of the policy's own code.
    """

    def make(options: dict[str, Any]) -> AnyPolicy | None:
        try:
            return policy(policy.Config(**options))
        except ValidationError:
            return None
        except Exception as error:  # foreign constructor
            where = f"{policy.__module__}.{policy.__qualname__}"
            raise ConfigError(f"{where} cannot be made: {type(error).__name__}: {error}") from error

    return make


def _smaller(policy: AnyPolicyClass) -> Iterable[dict[str, Any]]:
    """Yield options to try, the least changed first; the defaults come last."""
    fields = policy.Config.model_fields
    inner: dict[str, Any] = {"inner": _example()} if "inner" in fields else {}
    shares = [name for name, field in fields.items() if isinstance(field.default, float) and _is_share(field)]
    # A threshold above which a policy falls back to dense counts as a share as well, and must be high.
    tried: list[dict[str, Any]] = [{}, *({name: share} for share in (0.5, 1.0) for name in shares)]
    for large, middling in ((42, 8), (170, 8), (680, 32)):
        widths = {
            name: max(field.default // (large if field.default >= _LARGE else middling), 1)
            for name, field in fields.items()
            if type(field.default) is int and field.default >= _MIDDLING
        }
        yield from (inner | widths | share for share in tried)
    yield inner


def _example() -> DecodeCompressor[Any]:
    return SnapKVDecode(SnapKVDecode.Config(budget=24, window=8, kernel=3, sink_tokens=2, recent_window=4))


def leaves_something_out(policy: PrefillSparsifier) -> bool:
    """Return whether a first turn of 48 tokens is sparse."""
    try:
        mask = policy.sparsify(make_inputs(new_tokens=48, total_tokens=48, structured=True)).to_mask()
    except Exception:  # the checks report the error
        return False
    return float(mask.sum()) < _SPARSE * len(mask) * 48 * 49 / 2


def changed(policy: AnyPolicy, **options: Any) -> AnyPolicy:
    """Return a policy of the same class with some options replaced. Raises ValidationError where they are incompatible."""
    kept = {name: getattr(policy.config, name) for name in type(policy.config).model_fields}
    return type(policy)(type(policy.config)(**{**kept, **options}))


def evicting(policy: DecodeCompressor[Any]) -> DecodeCompressor[Any] | None:
    """Return the policy with the one option changed that makes it evict; None if no option does."""
    if policy.retention is Retention.EVICT:
        return policy
    for name, options in _alternatives(policy.config):
        for option in options:
            try:
                other = changed(policy, **{name: option})
            except ValidationError:
                continue
            if isinstance(other, DecodeCompressor) and other.retention is Retention.EVICT:
                return other
    return None


def _alternatives(config: PolicyConfig) -> Iterable[tuple[str, list[Any]]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Enum):
            yield name, [each for each in type(value) if each is not value]
        elif isinstance(value, DecodeCompressor):
            inner = evicting(value)
            yield name, [inner] if inner is not None else []


def widest(policy: AnyPolicy) -> AnyPolicy | None:
    """Return the policy with every share at 1 and every width beyond the conversation; None if it has no such option."""
    options: dict[str, Any] = {}
    for name, field in type(policy.config).model_fields.items():
        value = getattr(policy.config, name)
        if isinstance(value, float) and _is_share(field):
            options[name] = 1.0
        elif isinstance(value, int) and not isinstance(value, bool) and name.endswith(_WIDTHS):
            options[name] = WIDE
    if not options:
        return None
    try:
        return changed(policy, **options)
    except ValidationError:
        return None


def _is_share(field: FieldInfo) -> bool:
    """Return whether an option is a number from above 0 to 1 included; 0 being excluded separates it from weights and decays."""
    bounds = {name: getattr(each, name) for each in field.metadata for name in ("gt", "le") if hasattr(each, name)}
    return bounds == {"gt": 0, "le": 1} and float in (field.annotation, *get_args(field.annotation))


def budget_of(policy: DecodeCompressor[Any]) -> int | None:
    """Return the pairs per KV head that a compressor promises to attend to, mean over heads and layers."""
    limits = getattr(policy, "limits", policy.config)
    found = getattr(limits, "budget", None)
    return found if isinstance(found, int) else None


def forced_of(policy: DecodeCompressor[Any], option: str) -> int:
    """Return how many tokens an option such as ``sink_tokens`` forces in; 0 where a policy has no such option."""
    limits = getattr(policy, "limits", policy.config)
    return int(getattr(limits, option, 0) or 0)

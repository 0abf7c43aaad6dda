"""Public test tools, for our tests and for plugin authors: the conformance kit (``check_policy``,
``parametrize_with_policy_checks``), inputs, strategies, a scripted conversation, assertions, docs tables.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopserve.testing.kit import check_policy, parametrize_with_policy_checks

__all__ = ["check_policy", "parametrize_with_policy_checks"]


def __getattr__(name: str) -> Any:
    """The doors of the kit, loaded when asked for: the other tools do without policies and checks."""
    if name in __all__:
        from loopserve.testing import kit

        return getattr(kit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

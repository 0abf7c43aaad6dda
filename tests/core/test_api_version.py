"""What a plugin is written for, and what becomes of one that is written for something else."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from loopserve.core.errors import PluginError
from loopserve.core.policy.base import API_VERSION, require_api
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.registry import Kind, Registry

MAJOR, MINOR = API_VERSION


class Plain(DecodeCompressor[None]):
    """Does nothing and does not say what it is written for."""

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""

    def init_state(self) -> None:
        return None


def written_for(version: Any) -> type[DecodeCompressor[None]]:
    own = {"__doc__": Plain.__doc__, "__module__": __name__, "name": "dated", "paper": "", "api_version": version}
    return type("Dated", (Plain,), own)


def test_both_interfaces_and_this_version_are_accepted() -> None:
    assert PrefillSparsifier.api_version == DecodeCompressor.api_version == (1, 0)
    registry = Registry()
    registry.register(Plain)
    registry.register(written_for(API_VERSION))
    assert registry.names(Kind.DECODE) == ["dated", "plain"]


@pytest.mark.parametrize("older", [(MAJOR, minor) for minor in range(MINOR + 1)])
def test_an_older_minor_version_is_accepted(older: tuple[int, int]) -> None:
    require_api(older, "it")


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ((MAJOR + 1, 0), "update loopserve, or install an older version of it"),
        ((MAJOR, MINOR + 1), "update loopserve, or install an older version of it"),
        ((MAJOR - 1, 9), "install a newer version of it"),
    ],
)
def test_another_version_is_refused_by_name_with_what_to_do(version: tuple[int, int], remedy: str) -> None:
    registry = Registry()
    with pytest.raises(PluginError) as error:
        registry.register(written_for(version))
    assert str(error.value) == (
        f"{Plain.__module__}.Dated is written for version {version[0]}.{version[1]} of loopserve's plugin API, this "
        f"loopserve has {MAJOR}.{MINOR}: {remedy}"
    )
    assert len(registry) == 0


@pytest.mark.parametrize("version", ["1.0", 1, (1,), (1, 0, 0), (True, 0), None])
def test_what_is_no_version_is_refused(version: Any) -> None:
    with pytest.raises(PluginError, match="write two numbers"):
        Registry().register(written_for(version))

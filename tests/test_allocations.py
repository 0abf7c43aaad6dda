"""Every tensor the package makes says its dtype and its device: both have process-wide defaults that anybody may change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted((ROOT / "loopserve").rglob("*.py")),
    *sorted(path for path in (ROOT / "plugins").rglob("*.py") if "tests" not in path.parts),
]
# Without a dtype these take torch's default, or infer one from a value, which is the default for a float.
FLOATS = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "tensor", "as_tensor", "asarray", "scalar_tensor", "eye"),
    *("linspace", "logspace", "normal", "empty_strided", "empty_permuted", "complex", "polar", "hann_window"),
}
INTEGERS = {"arange", "range", "randint", "randperm"}  # of integers, unless a float is seen among the arguments
OLD_STYLE = {"Tensor", "FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor"}
DEFAULTS = {"get_default_dtype", "set_default_dtype", "set_default_device", "set_default_tensor_type"}


def faults(source: str) -> Iterator[str]:
    """What leaves a dtype or a device to a default, as ``line: what``."""
    tree = ast.parse(source)
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (
                f"{node.lineno}: {each.name} imported by name"
                for each in node.names
                if each.name in FLOATS | INTEGERS | DEFAULTS
            )
        if isinstance(node, ast.Call) and (name := _of_torch(node.func)):
            called.add(node.func)
            given = {each.arg for each in node.keywords}
            if name in OLD_STYLE:
                yield f"{node.lineno}: torch.{name}() has no dtype"
            if (name in FLOATS or (name in INTEGERS and _has_float(node))) and "dtype" not in given:
                yield f"{node.lineno}: torch.{name} without dtype="
            if name in FLOATS | INTEGERS and not given & {"device", "out"}:
                yield f"{node.lineno}: torch.{name} without device="
    for node in ast.walk(tree):
        name = _of_torch(node)
        if name in DEFAULTS or (name in FLOATS | INTEGERS and node not in called):
            yield f"{node.lineno}: torch.{name}"  # type: ignore[attr-defined]


def _of_torch(node: ast.AST) -> str | None:
    """The name of what is looked up in torch, None for anything else."""
    found = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return node.attr if found else None  # type: ignore[attr-defined]


def _has_float(call: ast.Call) -> bool:
    return any(
        (isinstance(each, ast.Constant) and isinstance(each.value, float))
        or (isinstance(each, ast.BinOp) and isinstance(each.op, ast.Div))
        for argument in call.args
        for each in ast.walk(argument)
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_allocated_by_default(path: Path) -> None:
    found = list(faults(path.read_text()))
    if path.name == "strict_checks.py":  # watches whether a policy changes the defaults
        found = [each for each in found if not each.endswith("_default_dtype")]
    assert found == []


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("torch.empty(3, device=d)", ["without dtype="]),
        ("torch.empty(3)", ["without dtype=", "without device="]),
        ("torch.tensor(1.5, dtype=x)", ["without device="]),
        ("torch.arange(3, device=d)", []),
        ("torch.arange(0, 1, 0.1, device=d)", ["without dtype="]),
        ("torch.arange(n / 2, device=d)", ["without dtype="]),
        ("torch.full((3,), 1, dtype=x, device=d)", []),
        ("torch.Tensor([1.0])", ["has no dtype"]),
        ("make = torch.zeros", ["torch.zeros"]),
        ("from torch import zeros", ["imported by name"]),
        ("torch.get_default_dtype()", ["torch.get_default_dtype"]),
        ("x.new_zeros(3)", []),
    ],
)
def test_the_walk_sees(source: str, wanted: list[str]) -> None:
    found = list(faults(source))
    assert len(found) == len(wanted)
    assert all(part in each for part, each in zip(wanted, found, strict=True))

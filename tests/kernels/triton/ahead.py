"""Compiling what a call would launch, for GPUs that are not there.

``recorded`` runs operations on CPU tensors with the start of kernels replaced by a note of it; ``compiled`` gives the
compiler what it would get at run time: types, constants, and which pointers and integers divide by 16.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loopserve.kernels.gpu import launch

# What a block may use of a processor's shared memory, in bytes. cuda_C_programming_guide, table of compute capabilities.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages")
_COPY = re.compile(r"cp\.async\.c[ag]")
_WIDE = re.compile(r"cp\.async\.c[ag][^;]*?, 0x10,")
_SINGLE = re.compile(r"ld\.global[\w.:]*\.[bu]16\b")
_MATRIX = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, without its data."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """Hold what the compiler made of a launch."""

    registers: int
    spilled: int  # bytes of stack per thread
    shared: int  # bytes
    matrix: int  # matrix instructions in the PTX
    copies: int  # instructions in the PTX that copy up to 16 bytes to shared memory without waiting
    wide: int  # those of 16 bytes
    single: int  # instructions in the PTX that read one 16-bit number from memory


def noted(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """A launch as the run time would specialise it."""
    names = [each.name for each in kernel.params]
    given = dict(zip(names, args, strict=False)) | {name: options[name] for name in names if name in options}
    signature, constants, divisible = [], [], []
    for number, each in enumerate(kernel.params):
        value = given[each.name]
        if each.is_constexpr or value is None or (type(value) is int and value == 1 and not each.do_not_specialize):
            signature.append((each.name, "constexpr"))
            constants.append((each.name, value))
            continue
        if isinstance(value, Tensor):
            signature.append((each.name, _TYPES[value.dtype]))
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature.append((each.name, "fp32"))
            aligned = False
        else:
            signature.append((each.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            aligned = value % 16 == 0 and not each.do_not_specialize
        if aligned:
            divisible.append(number)
    chosen = tuple((name, options[name]) for name in _OPTIONS if name in options)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), chosen)


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches made inside, on a device of that compute capability (80, 90, ...) that is not there; nothing runs."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert all(size > 0 for size in grid)
        launches.append(noted(kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_start", note)
        patch.setattr(launch, "generation", lambda device: capability // 10)
        patch.setattr(launch, "processors", lambda device: 132)
        yield launches


def launches_of(call: Callable[[], object], capability: int) -> list[Launch]:
    """The different launches of a call."""
    with recorded(capability) as launches:
        call()
    return list(dict.fromkeys(launches))


def compiled(one: Launch, capability: int) -> Compiled:
    """Compile for a GPU that need not be there."""
    constants = dict(one.constants)
    source = ASTSource(
        one.kernel,
        dict(one.signature),
        {(number,): constants[name] for number, (name, _) in enumerate(one.signature) if name in constants},
        {(number,): [["tt.divisibility", 16]] for number in one.divisible},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns that its default will change
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(one.options))
    registers, spilled = _resources(made.asm["cubin"])
    text = made.asm["ptx"]
    counts = (len(each.findall(text)) for each in (_MATRIX, _COPY, _WIDE, _SINGLE))
    return Compiled(registers, spilled, made.metadata.shared, *counts)


def _resources(binary: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        printed = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])

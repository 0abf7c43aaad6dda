"""Compiles the C kernels into the wheel, for every instruction set of the architecture, where a C compiler is at hand.

Without one the wheel is pure Python; the kernels are then built at first use, or not at all (``loopserve env`` says which). An
editable install builds at first use.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("loopserve") / "kernels" / "native"


class CompiledKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        build = _load(Path(self.root) / NATIVE / "build.py")
        library = Path(tempfile.mkdtemp()) / "_native.so"
        try:
            build.build(library, build.levels(), build.find_compiler())
        except build.BuildError as error:
            print(f"no compiled kernels in this wheel: {error}", file=sys.stderr)
            return
        build_data["force_include"][str(library)] = str(NATIVE / library.name)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # C with a plain interface: any Python of the platform


def _load(path: Path) -> Any:
    """The module alone: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("loopserve_native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

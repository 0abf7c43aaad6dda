"""Compiles the C kernels into a platform wheel where ``LOOPSERVE_WHEEL=compiled`` asks for one.

The wheel is pure Python otherwise: it holds the C sources, which are compiled for the machine at first use, or by ``loopserve kernels
build``. A wheel built on Linux would be tagged ``linux_x86_64``, which PyPI refuses, and would hold code that needs the C library of
the machine that built it. For one's own machines that is good enough; for PyPI, ``auditwheel repair`` it in a manylinux image.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("loopserve") / "kernels" / "native"
VARIABLE = "LOOPSERVE_WHEEL"


class CompiledKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get(VARIABLE, "pure")
        if wanted not in ("pure", "compiled"):
            raise ValueError(f"{VARIABLE}={wanted} is unknown: set pure or compiled")
        if version == "editable" or wanted == "pure":
            return
        build = _load(Path(self.root) / NATIVE / "build.py")
        library = Path(tempfile.mkdtemp()) / "_native.so"
        build.build(
            library, build.levels(), build.find_compiler()
        )  # a BuildError ends the build: a compiled wheel was asked for
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

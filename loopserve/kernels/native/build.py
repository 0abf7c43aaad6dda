"""Build the C sources into one shared library with a variant per instruction set.

The module depends on compilers and files only, not on torch. The build runs at first use (for this machine's
instruction set), by ``loopserve kernels build``, and for a platform wheel (for all instruction sets of the
architecture). It downloads nothing and needs only the headers of the C library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
_COMMON = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fno-trapping-math", "-Wall")
# -fno-math-errno and -fno-trapping-math let loops vectorise. -ffast-math is not used: linking with it makes old gcc
# set flush-to-zero for the whole process, and the compiler would remove NaN checks.


class BuildError(Exception):
    """Report why no library could be built."""


@dataclass(frozen=True)
class Level:
    """Describe an instruction set: its compiler flags, and the macro that a compiler defines for it."""

    name: str
    flags: tuple[str, ...]
    macro: str | None = None  # None: part of every processor of the architecture


_GENERIC = Level("generic", ())  # NEON is part of every aarch64
_X86 = (  # best first
    Level(
        "avx512bf16",
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"),
        "__AVX512BF16__",
    ),
    Level("avx512", ("-march=x86-64-v4", "-mprefer-vector-width=512"), "__AVX512BW__"),
    Level("avx2", ("-march=x86-64-v3",), "__AVX2__"),
    _GENERIC,
)


def extra_flags() -> tuple[str, ...]:
    """Return additional compiler flags from ``$LOOPSERVE_CFLAGS``, for example for a sanitizer."""
    return tuple(shlex.split(os.environ.get("LOOPSERVE_CFLAGS", "")))


def levels() -> tuple[Level, ...]:
    """Return the instruction sets of this architecture, best first."""
    return _X86 if platform.machine() in ("x86_64", "AMD64") else (_GENERIC,)


@cache
def source_digest() -> str:
    """Return a digest that changes with every change of a source."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    """Return the path of a C compiler: ``$CC``, else the first of cc, gcc, clang. Raises BuildError."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(
        f"CC={wanted} is not found" if wanted else "no C compiler found (cc, gcc, clang); set CC to name one"
    )


def compiler_version(compiler: str) -> str:
    """Return the first line of the compiler's version output. Raises BuildError."""
    return _run([compiler, "--version"]).partition("\n")[0]


def machine_level(compiler: str) -> Level:
    """Return the best instruction set of this machine, as its compiler detects it. Raises BuildError.

    ``$LOOPSERVE_CPU_LEVEL`` names a lower one, for comparisons.
    """
    wanted = os.environ.get("LOOPSERVE_CPU_LEVEL")
    if wanted:
        for level in levels():
            if level.name == wanted:
                return level
        raise BuildError(
            f"LOOPSERVE_CPU_LEVEL={wanted} is unknown (known: {', '.join(each.name for each in levels())})"
        )
    macros = _run([compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    for level in levels():
        if level.macro is None or f"#define {level.macro} " in macros:
            return level
    return _GENERIC


def build(target: Path, wanted: tuple[Level, ...], compiler: str) -> None:
    """Compile the sources for each level and link them to ``target``, atomically. Raises BuildError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as created:
            folder = Path(created)
            library = folder / "library.so"
            try:
                _compile(folder, library, wanted, compiler, threads=("-fopenmp",))
            except BuildError:  # without OpenMP the kernels run on one thread
                _compile(folder, library, wanted, compiler, threads=())
            os.replace(library, target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error.strerror}") from error


def _compile(folder: Path, library: Path, wanted: tuple[Level, ...], compiler: str, threads: tuple[str, ...]) -> None:
    files = sorted(SOURCES.glob("*.c"))
    digest = f'-DLS_DIGEST="{source_digest()}"'
    jobs: list[tuple[Path, str, tuple[str, ...]]] = []
    for source in files:
        if source.name == "dispatch.c":
            names = "".join(f" LS_LEVEL({level.name})" for level in wanted)
            jobs.append((source, "all", (f"-DLS_LEVELS={names.strip()}", digest)))
        else:
            jobs.extend((source, level.name, (f"-DLS_SUFFIX={level.name}", *level.flags)) for level in wanted)

    def run(job: tuple[Path, str, tuple[str, ...]]) -> str:
        source, name, flags = job
        made = str(folder / f"{source.stem}-{name}.o")
        _run([compiler, *_COMMON, *threads, *flags, *extra_flags(), "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = list(pool.map(run, jobs))
    _run([compiler, "-shared", *threads, *extra_flags(), *made, "-lm", "-o", str(library)])


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        lines = (
            [line for line in error.stderr.splitlines() if "error" in line]
            or error.stderr.splitlines()
            or ["no message"]
        )
        raise BuildError(f"{command[0]} failed: {lines[0]}") from error
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error.strerror}") from error

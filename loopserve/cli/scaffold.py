"""Define ``loopserve policies new``: write a complete distribution with one working policy, to be edited."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from loopserve.cli.options import Format, FormatOption, Settings
from loopserve.cli.output import print_json
from loopserve.core.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_KINDS = ("prefill", "decode")
_STACKS = {
    "prefill": "prefill: {policy: $policy}\ndecode: {policy: full}",
    "decode": "prefill: {policy: dense}\ndecode: {policy: $policy, budget: 256}",
    "wrapper": "prefill: {policy: dense}\ndecode: {policy: $policy, inner: {policy: snapkv, budget: 256}}",
}


@dataclass(frozen=True)
class Names:
    """Derive all names of a new distribution from one word on the command line."""

    policy: str  # in stack files: my_policy

    @classmethod
    def of(cls, word: str) -> Names:
        """Return the names. Raises ConfigError unless the word is lower-case words joined by '-' or '_'."""
        if not _NAME.fullmatch(word):
            near = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", word).lower()).strip("-")
            example = near if _NAME.fullmatch(near) else "my-policy"
            raise ConfigError(
                f"{word!r} is no name for a policy: write lower-case words of letters and digits joined by '-', such as "
                f"{example!r} (in stack files it is then {example.replace('-', '_')!r})"
            )
        return cls(word.replace("-", "_"))

    @property
    def name(self) -> str:
        return self.policy.replace("_", "-")

    @property
    def distribution(self) -> str:
        return f"loopserve-{self.name}"

    @property
    def module(self) -> str:
        return f"loopserve_{self.policy}"

    def class_name(self, kind: str) -> str:
        """Return a class name such as ``MyPolicyDecode``. With the kind added, it cannot be a keyword or hide an import of the
        file.
        """
        return "".join(word.capitalize() for word in self.policy.split("_")) + kind.capitalize()


def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Lower-case words, such as my-policy; in stack files it is my_policy.")],
    kind: Annotated[str, typer.Option(help="prefill or decode.")],
    wrapper: Annotated[
        bool, typer.Option("--wrapper", help="A decode policy that changes what another one does.")
    ] = False,
    directory: Annotated[Path, typer.Option(help="Where the folder of the new distribution is made.")] = Path("."),
    format: FormatOption = Format.HUMAN,
) -> None:
    """Write a distribution with one policy, ready for `pip install -e`: source, entry point, conformance test, README."""
    if kind not in _KINDS:
        raise ConfigError(f"--kind {kind}: a policy is prefill or decode")
    if wrapper and kind != "decode":
        raise ConfigError("--wrapper: only decode policies wrap others; leave it out, or use --kind decode")
    names = Names.of(name)
    settings: Settings = context.obj
    _refuse_taken(settings, names, kind)
    folder = directory / names.distribution
    written = write_distribution(folder, names, kind, "wrapper" if wrapper else kind)
    if format is Format.JSON:
        print_json(
            {
                "policy": names.policy,
                "kind": kind,
                "distribution": names.distribution,
                "module": names.module,
                "directory": str(folder),
                "files": [str(each) for each in written],
            }
        )
        return
    for each in written:
        print(each)
    print(f"\ncd {folder}\npip install -e '.[test]'\nloopserve policies check {names.policy}")


def _refuse_taken(settings: Settings, names: Names, kind: str) -> None:
    """Raise ConfigError if the name of the policy or of the plugin is taken."""
    loaded = settings.plugins()
    for each in loaded.registry:
        if (each.kind, each.name) == (kind, names.policy):
            raise ConfigError(
                f"the name {names.policy!r} is taken by the {kind} policy of {each.owner}: choose another"
            )
    for plugin in loaded.plugins:
        if plugin.name == names.policy:
            raise ConfigError(f"the name {names.policy!r} is taken by the plugin of {plugin.owner}: choose another")


def write_distribution(folder: Path, names: Names, kind: str, template: str) -> list[Path]:
    """Create the folder and its files, and return their paths. Raises ConfigError if it exists, or cannot be written.

    template: prefill, decode or wrapper.
    """
    source = resources.files("loopserve") / "templates"
    words = {
        "policy": names.policy,
        "name": names.name,
        "distribution": names.distribution,
        "module": names.module,
        "class_name": names.class_name(kind),
        "kind": kind,
    }
    words["stack"] = Template(_STACKS[template]).substitute(words)
    files = {
        "pyproject.toml": "pyproject.toml.txt",
        f"{names.module}.py": f"{template}.py.txt",
        "tests/test_conformance.py": "test_conformance.py.txt",
        "README.md": "README.md.txt",
    }
    if folder.exists():
        raise ConfigError(f"{folder} is there already and stays as it is: choose another name or --directory")
    written = []
    try:
        (folder / "tests").mkdir(parents=True)
        for path, made_from in files.items():
            text = Template((source / made_from).read_text("utf-8")).substitute(words)
            (folder / path).write_text(text, encoding="utf-8")
            written.append(folder / path)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
    return written

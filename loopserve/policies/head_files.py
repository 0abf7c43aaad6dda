"""Read and write the files that give something for each head of each layer: lines, numbers of lines, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loopserve.core.errors import ConfigError
from loopserve.core.stack.config import read_yaml

Form = TypeVar("Form", bound=BaseModel)


def read_head_file(path: str, form: type[Form], example: str) -> Form:
    """Return a YAML or JSON file as ``form``. Raises ConfigError, with the place, for a file that has another form.

    example: how a right file is written, for the error.
    """
    document = read_yaml(Path(path))  # JSON is YAML
    if document.problems:
        raise ConfigError("\n".join(map(str, document.problems)))
    try:
        return form.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg']}; {example}") from error


def write_head_file(path: str, layers: Mapping[int, Sequence[Any]], model: str) -> None:
    """Write what each head has, by layer, and the model it was measured on. Raises ConfigError if the file cannot be written."""
    body = {"model": model, "layers": {str(layer): list(heads) for layer, heads in layers.items()}}
    try:
        Path(path).write_text(json.dumps(body) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def misfit(
    given: Mapping[int, Sequence[Any]],
    layer: int,
    heads: int,
    path: str | None,
    *,
    kind: str,
    of: str = "heads",
    searched: bool = False,
) -> str | None:
    """Return why a file does not fit a layer of ``heads`` heads, or None.

    kind: what the file gives. of: the name of its heads. searched: a command of ours writes such a file for a model.
    """
    found = given.get(layer)
    if found is None:
        return f"has no {kind} for it in {path}" + (": search them on this model" if searched else "")
    if len(found) != heads:
        return f"has {kind} for {len(found)} {of} in {path}, the layer has {heads}"
    return None

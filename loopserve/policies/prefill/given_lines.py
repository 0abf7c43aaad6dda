"""Read the file that names lines per head, for ``static_lines``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from loopserve.core.errors import ConfigError
from loopserve.core.stack.config import read_yaml


class HeadLines(BaseModel):
    """Hold the lines of one query head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verticals: tuple[NonNegativeInt, ...] = Field((), description="Places in the conversation.")
    slashes: tuple[NonNegativeInt, ...] = Field((), description="Offsets, query minus key.")


class _LinesFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: dict[int, list[HeadLines]]


GivenLines = Mapping[int, Sequence[HeadLines]]


def read_lines(path: str) -> GivenLines:
    """Return lines per head by layer. Raises ConfigError, with the place, for a file that has another form."""
    document = read_yaml(Path(path))  # JSON is YAML
    if document.problems:
        raise ConfigError("\n".join(map(str, document.problems)))
    try:
        return _LinesFile.model_validate(document.data).layers
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {where}: {first['msg']}; a lines file says layers: {{0: [{{verticals: [0], slashes: [0, 1]}}, ...]}}"
        ) from error

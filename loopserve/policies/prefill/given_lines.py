"""Read the file that names lines per head, for ``static_lines``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from loopserve.policies.head_files import read_head_file


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
    example = "a lines file says layers: {0: [{verticals: [0], slashes: [0, 1]}, ...]}"
    return read_head_file(path, _LinesFile, example).layers

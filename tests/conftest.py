"""Shared by all tests: repeatable hypothesis runs, one thread per worker, a pipe's width, a data folder of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")
torch.set_num_threads(1)
os.environ.pop("COLUMNS", None)  # pytest-xdist sets 80 in its workers; what is written to a pipe has no width
os.environ.pop("LOOPSERVE_LOG", None)
os.environ["LOOPSERVE_DTYPE"] = (
    "float32"  # else ``auto`` depends on the processor, here and in processes that tests start
)
os.environ["LOOPSERVE_BREAK_EVEN"] = "off"  # what somebody calibrated on this machine changes no test


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave ``tests/real`` out unless it is named (``make test-real``): its model is downloaded."""
    real = Path(__file__).parent / "real"
    asked = any(real in (path := Path(each.split("::")[0]).resolve(), *path.parents) for each in config.args)
    return True if collection_path == real and not asked else None


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Conversations of tests are not logged beside the user's own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield

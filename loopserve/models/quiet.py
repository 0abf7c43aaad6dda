"""Silence the libraries below during a chat."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("huggingface_hub", "torch", "accelerate")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings and progress bars of transformers, huggingface_hub and torch inside the block. Errors are shown.

    TRANSFORMERS_VERBOSITY in the environment keeps the warnings of transformers.
    """
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            transformers_logging.set_verbosity_error()
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()  # those of huggingface_hub as well
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()

"""Shared by all tests: repeatable hypothesis runs, one thread per worker, a pipe's width."""

import os

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
os.environ.pop("COLUMNS", None)  # workers are told 80; what is written to a pipe has no width

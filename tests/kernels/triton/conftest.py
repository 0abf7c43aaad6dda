"""Triton exists for Linux only; elsewhere these tests are not even collected."""

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

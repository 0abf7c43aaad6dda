"""Provide benchmark dialogues: synthetic ones, the published set, or LongBench recombined. Each is a ``Task`` of bench.samples."""

from loopserve.bench.samples import fit
from loopserve.bench.tasks.registry import known_tasks, make_tasks, task_by_name

__all__ = ["fit", "known_tasks", "make_tasks", "task_by_name"]

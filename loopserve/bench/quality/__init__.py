"""Run benchmark dialogues under several stacks, record every turn, and make tables and plots.

From Python: ``runner.run_suite`` runs a suite and returns records; ``tables.table`` and ``comparison.compare`` read
them.
"""

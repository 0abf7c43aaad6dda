"""Quality runs: benchmark dialogues held under several stacks, what came of it turn by turn, and the tables and plots of it.

From Python: ``runner.run_suite`` asks everything and gives records; ``tables.table`` and ``comparison.compare`` read them.
"""

"""Measure answer quality, memory and speed of policy stacks."""

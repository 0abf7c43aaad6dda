"""Decode policies: which stored pairs the answer attends to."""

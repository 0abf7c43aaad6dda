"""Hold the decode policies: which stored pairs the answer attends to."""

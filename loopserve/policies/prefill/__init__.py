"""Hold the prefill policies: which cells of a new turn's attention are computed."""

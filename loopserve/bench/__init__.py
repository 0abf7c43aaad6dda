"""Tasks, metrics and runs that show what a stack gives and what it costs."""

"""Drive forward passes: sessions, turns, attention, sampling and statistics."""

"""Measure an OpenAI-compatible server from outside: conversations of several turns, many at once."""

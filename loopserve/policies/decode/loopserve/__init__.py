"""Implement LoopServe, phase two: progressive KV compression."""

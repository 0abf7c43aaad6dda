"""Define the tables of the store, and the errors of a disk that takes nothing."""

from __future__ import annotations

import sqlite3

SCHEMA_VERSION = 2
TABLES = """
CREATE TABLE IF NOT EXISTS {db}.sessions (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, key TEXT, head TEXT, created REAL NOT NULL, updated REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS {db}.turns (
    id TEXT PRIMARY KEY, session TEXT NOT NULL, parent TEXT, tenant TEXT NOT NULL, model TEXT NOT NULL, stack TEXT NOT NULL,
    digest BLOB NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL, prompt_tokens BLOB NOT NULL, output_tokens BLOB NOT NULL,
    created REAL NOT NULL, finish_reason TEXT NOT NULL, figures TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS {db}.turns_by_digest ON turns (tenant, digest);
CREATE INDEX IF NOT EXISTS {db}.turns_by_parent ON turns (parent);
CREATE INDEX IF NOT EXISTS {db}.turns_by_session ON turns (session);
CREATE INDEX IF NOT EXISTS {db}.sessions_by_head ON sessions (head);
CREATE INDEX IF NOT EXISTS {db}.sessions_by_key ON sessions (tenant, key);
"""
KV_TABLE = """
CREATE TABLE IF NOT EXISTS main.kv (
    turn TEXT PRIMARY KEY, file TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, manifest TEXT NOT NULL,
    created REAL NOT NULL
);
"""
# What the API keeps beside turns and sessions, by their ids: responses as they were given, conversations with their metadata.
OBJECTS = """
CREATE TABLE IF NOT EXISTS {db}.objects (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, body TEXT NOT NULL);
"""
# Primary result codes of a disk, a file or a lock that lets nothing be written.
_REFUSALS = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_PROTOCOL,
    }
)


def refused(error: sqlite3.Error) -> bool:
    """Return whether the disk, the file or a lock let nothing be read or written; else the error is one of ours."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSALS

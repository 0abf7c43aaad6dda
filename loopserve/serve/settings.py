"""Hold the settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loopserve.core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """Hold the settings of a server. Bytes and seconds are plain numbers."""

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # none: everybody may ask, as the tenant ``anonymous``
    insecure: bool = False  # serve other machines without a key
    session_dir: Path | None = None  # None: conversations are kept in memory only
    session_key: bytes | None = field(default=None, repr=False)  # 32 bytes: what is in the directory is encrypted
    kv_cache_memory: int | None = 4 << 30
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_pass_steps: float | None = 2.0  # see ``Scheduler``
    max_queued: int = 256
    session_disk: int | None = None  # bytes that the caches of all conversations may take on disk; None: any
    session_disk_per_key: int | None = None  # the same for those of one key
    max_requests_per_key: int | None = None  # answers under way or waiting; None: as many as the server takes
    session_ttl_s: float | None = 24 * 3600.0  # None: conversations are kept for ever
    shutdown_timeout_s: float = 30.0
    ready_again_s: float = 10.0  # after the last failed pass of an engine that seems broken, /ready answers 200 again
    max_body_bytes: int = 8 << 20
    max_n: int = 16  # answers to one request
    default_max_tokens: int = 1024  # of an answer whose request gives no limit
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header beside the own ones, without a key

    def check(self) -> None:
        """Raise ConfigError for settings that are not safe or contradict each other."""
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise ConfigError("--api-key: a key is empty or holds characters that no HTTP header can carry")
        if self.session_key is not None and self.session_dir is None:
            raise ConfigError("--session-key-file: there is no --session-dir that it could encrypt")
        if self.host not in LOOPBACK and not self.api_keys and not self.insecure:
            raise ConfigError(
                f"--host {self.host}: other machines could use the model and read every conversation; give --api-key or "
                "--api-key-file, or --insecure if that is what you want"
            )


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file, one a line; empty lines and lines that begin with # do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: cannot be read ({error})") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: it holds no key; write one a line")
    return keys

"""Encrypt what a session directory holds: AES-256-GCM under a key that its owner keeps elsewhere. Without a key nothing is changed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from pathlib import Path

from loopserve.core.errors import ConfigError

KEY_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 12, 16


class Sealer:
    """Seal bytes, each bound to its place: what is moved to another place, or changed, does not open.

    A nonce of 96 random bits goes before each sealed value; one key is good for some billions of values.
    """

    def __init__(self, key: bytes | None = None) -> None:
        """key: 32 random bytes; None leaves everything as it is. ConfigError if ``cryptography`` is not installed."""
        self._cipher = None
        if key is None:
            return
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError as error:
            raise ConfigError("--session-key-file needs cryptography: pip install 'loopserve[encrypt]'") from error
        self._cipher = AESGCM(_derived(key, b"loopserve values"))
        self._index_key = _derived(key, b"loopserve index")

    @property
    def active(self) -> bool:
        """Return whether there is a key."""
        return self._cipher is not None

    def seal(self, data: bytes, place: str) -> bytes:
        """Return sealed bytes. place: name of where they are kept, the same for ``open``."""
        if self._cipher is None:
            return data
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed: bytes = self._cipher.encrypt(nonce, data, place.encode())
        return nonce + sealed

    def open(self, data: bytes, place: str) -> bytes:
        """Return what was sealed. Raises ValueError for another key, another place or a changed byte."""
        if self._cipher is None:
            return data
        from cryptography.exceptions import InvalidTag

        try:
            if len(data) < _NONCE_BYTES + _TAG_BYTES:
                raise InvalidTag
            opened: bytes = self._cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], place.encode())
        except InvalidTag:
            raise ValueError("it does not open with this key: it was changed, or sealed with another one") from None
        return opened

    def seal_text(self, text: str, place: str) -> str | bytes:
        """Return a text as it is kept: itself, or sealed."""
        return text if self._cipher is None else self.seal(text.encode(), place)

    def open_text(self, kept: str | bytes, place: str) -> str:
        """Return a text that ``seal_text`` returned. Raises ValueError, see ``open``."""
        if isinstance(kept, bytes):
            return self.open(kept, place).decode()
        if self._cipher is not None:
            raise ValueError("it is not sealed")
        if not isinstance(kept, str):
            raise ValueError("it is no text")
        return kept

    def index(self, digest: bytes) -> bytes:
        """Return what stands for a digest in an index, so that nobody without the key can tell what a guess would be found as."""
        return digest if self._cipher is None else hmac.digest(self._index_key, digest, "sha256")


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, purpose, hashlib.sha256)


def read_key(path: Path) -> bytes:
    """Return the key in a file: 32 bytes, plain or written as hex or base64. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--session-key-file {path}: cannot be read ({error.strerror})") from error
    if len(data) == KEY_BYTES:
        if all(each in b"0123456789abcdefABCDEF" for each in data):
            raise ConfigError(
                f"--session-key-file {path}: it holds {KEY_BYTES} hex digits, which are {KEY_BYTES // 2} bytes and not "
                f"{KEY_BYTES}; make a key: openssl rand -hex {KEY_BYTES} > {path}"
            )
        return data
    for decode in (bytes.fromhex, lambda text: base64.b64decode(text, validate=True)):
        try:
            found = decode(data.decode().strip())
        except ValueError:
            continue
        if len(found) == KEY_BYTES:
            return found
    raise ConfigError(
        f"--session-key-file {path}: it holds no key of {KEY_BYTES} bytes; make one: openssl rand -hex 32 > {path}"
    )

"""Open the socket of a server before its model is loaded, so that a port in use is known at once and a restart keeps the port."""

from __future__ import annotations

import socket

from loopserve.core.errors import ConfigError
from loopserve.serve.settings import ServerSettings


def listen(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens on the address of the settings. Raises ConfigError if that cannot be done."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {settings.host} --port {settings.port}: cannot listen there ({error.strerror}); choose another port"
        ) from error
    listener.set_inheritable(False)
    return listener

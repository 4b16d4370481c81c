"""TLS of the agent's server: certificates from files, read again when they change (Kubernetes renews its secrets)."""

from __future__ import annotations

import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from agent.errors import WeirError
from agent.node.log import log


@dataclass(frozen=True)
class Tls:
    """Files in PEM. With ``client_ca``, who connects must show a certificate that one of its authorities signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def tls_of(cert: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    """What the three options ask for; None is plain HTTP.

    Raises WeirError when one lacks another.
    """
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise WeirError("TLS needs both a certificate and its key", "Give --tls-cert and --tls-key.")
    return Tls(cert, key, client_ca)


class Contexts:
    """The context for the next connection. Raises WeirError when the files cannot be used at the start."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._stamp = self._now()
        self._context = context(tls)

    def newest(self) -> ssl.SSLContext:
        """From the files as they are now; while those are no good, the last one that was."""
        with self._lock:
            stamp = self._now()
            if stamp != self._stamp:
                try:
                    self._context = context(self._tls)
                except WeirError as e:
                    log.warning("new TLS files cannot be used, the old certificate stays", error=e)
                else:
                    self._stamp = stamp
                    log.info("TLS files read again", cert=self._tls.cert)
            return self._context

    def _now(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_stamp(path) for path in (self._tls.cert, self._tls.key, self._tls.client_ca) if path)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or newer, with these files. Raises WeirError that names the file that is wrong."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (tls.cert, tls.key, tls.client_ca):
        if path is not None:
            _readable(path)
    try:
        made.load_cert_chain(tls.cert, tls.key, password="")  # or OpenSSL asks on the terminal
    except (ssl.SSLError, OSError, ValueError) as e:
        raise WeirError(
            f"{tls.cert} and {tls.key} are no certificate and key that belong together: {_reason(e)}",
            "Both must be in PEM, the key without a password; the certificate first, then those that signed it.",
        ) from e
    if tls.client_ca is not None:
        try:
            made.load_verify_locations(tls.client_ca)
        except (ssl.SSLError, OSError) as e:
            raise WeirError(
                f"{tls.client_ca} has no certificate of an authority: {_reason(e)}",
                "Give the certificates in PEM of those who sign for your Prometheus.",
            ) from e
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def _reason(error: Exception) -> str:
    return (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")


def _readable(path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as e:
        raise WeirError(
            f"{path} cannot be read: {e.strerror}", "Check the path, and that the agent may read it."
        ) from e

"""Certificates for a test: an authority, and what it signed, made by openssl's command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests import need


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    cert: Path
    key: Path


def _make(directory: Path, name: str, *options: str | Path) -> Pair:
    pair = Pair(directory / f"{name}.pem", directory / f"{name}.key")
    command = [need.command("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-noenc", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(pair.cert)]
    subprocess.run([*command, *map(str, options)], check=True, capture_output=True)
    return pair


def authority(directory: Path, name: str = "authority") -> Pair:
    """One that may sign others."""
    # Clients of Python 3.13 demand the extension.
    return _make(directory, name, "-addext", "keyUsage=critical,keyCertSign,cRLSign")


def signed(directory: Path, name: str, by: Pair) -> Pair:
    """A certificate for 127.0.0.1, and for whoever connects from there."""
    names = ("-addext", "subjectAltName=IP:127.0.0.1,IP:::1", "-addext", "basicConstraints=critical,CA:FALSE")
    return _make(directory, name, "-CA", by.cert, "-CAkey", by.key, *names)

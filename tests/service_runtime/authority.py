"""Certificates for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Files:
    """What one authority has signed, as PEM files."""

    ca: Path
    cert: Path
    key: Path


def authority(folder: Path, *names: str) -> Files:
    folder.mkdir()
    files = Files(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    ca = trustme.CA()
    leaf = ca.issue_cert(*(names or ("127.0.0.1", "localhost")))
    ca.cert_pem.write_to_path(files.ca)
    leaf.private_key_pem.write_to_path(files.key)
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(files.cert, append=True)
    return files

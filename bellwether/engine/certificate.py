"""The certificate of a port."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key, and the authority by which others know it; all are files in PEM."""

    chain: Path
    key: Path
    authority: Path

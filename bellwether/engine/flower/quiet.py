"""Flower says nothing to anybody but its log file, and speaks with its own processes past any proxy.

It reads these variables when it is imported, so this comes before anything of Flower's.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
from pathlib import Path

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1"
)
for _name in ("NO_PROXY", "no_proxy"):  # what is on loopback is this machine's own
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1"]))


LARGEST_LOG = 2**24  # bytes; one log as large is kept beside, of what was before


class _Log(logging.handlers.RotatingFileHandler):
    """A log that says nothing where it cannot be written, such as on a full disk: more than it is lost there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LARGEST_LOG, backupCount=1, encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        return


def log_to(path: Path) -> None:
    """Let Flower write to a file what it would write to the terminal, of bounded size."""
    handler = _Log(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger in map(logging.getLogger, ("flwr", "uvicorn", "alembic")):
        for old in list(logger.handlers):
            logger.removeHandler(old)
            if isinstance(old, logging.FileHandler):
                old.close()
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)

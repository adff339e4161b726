"""Work that takes long, in a module of its own: processes that do it need not load what tests need."""

import os
import time
from pathlib import Path


def sleep_long(path: Path) -> None:
    """Leave the number of this process in a folder, and sleep."""
    (path / str(os.getpid())).touch()
    time.sleep(600)

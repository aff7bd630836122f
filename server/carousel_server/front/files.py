"""Files that the server reads again when they change."""

import logging
import stat
from pathlib import Path

log = logging.getLogger("carousel")

# What differs once a file was written or replaced, links followed.
Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """None while it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def warn_if_readable(path: Path, what: str) -> None:
    """Warn where every user of this machine may read or write a file."""
    if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning("%s in %s can be read by every user of this machine: chmod o-rw %s", what, path, path)

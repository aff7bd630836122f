"""What the kernel knows of a server's process."""

import re
from pathlib import Path

from soak.errors import SoakError


def rss_mb(pid: int) -> float:
    """Resident memory. Raises `SoakError` where the process has ended."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    if found is None:
        raise SoakError("the server ended by itself")
    return int(found[1]) / 1024

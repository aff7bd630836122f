"""Points at which a test has this process killed, as a power cut would: inert unless `CAROUSEL_FAULT` arms one.

`CAROUSEL_FAULT=after-commit:17` sends SIGKILL to the process when it passes `after-commit` for the 17th time.
"""

import os
import signal
from collections import Counter
from typing import Literal, get_args

from carousel_server.errors import ConfigError

Point = Literal["before-run", "after-run", "after-commit", "after-answer"]
VARIABLE = "CAROUSEL_FAULT"


def _read(setting: str) -> tuple[str, int]:
    point, _, count = setting.partition(":")
    if setting and (point not in get_args(Point) or not count.isdecimal()):
        raise ConfigError(
            f"{VARIABLE} is {setting!r}: it must be POINT:COUNT, POINT one of {', '.join(get_args(Point))}"
        )
    return point, int(count or 0)


_ARMED, _COUNT = _read(os.environ.get(VARIABLE, ""))
_passed: Counter[str] = Counter()


def reach(point: Point) -> None:
    """End the process here and now, if this is the point and the time that was armed."""
    if point == _ARMED:
        _passed[point] += 1
        if _passed[point] == _COUNT:
            os.kill(os.getpid(), signal.SIGKILL)

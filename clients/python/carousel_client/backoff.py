"""When to try again: exponential, with full jitter, within a total time. No clock: time is passed in."""

import random

# Seconds: the first delay is drawn from up to FIRST_S, each later one from twice as much, up to MOST_S.
FIRST_S, MOST_S = 0.05, 5.0


class Backoff:
    """The delays of one row of failures, at most `total` seconds from the first failure to the last retry.

    Full jitter, after Brooker, "Exponential Backoff and Jitter" (2015): clients that failed together do not come back
    together.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        self._attempts = 0
        self._since: float | None = None

    def delay(self, now: float, *, least: float = 0.0) -> float | None:
        """Seconds to wait after a failure at `now`, `least` if there is time for it; None: the total time is over."""
        if self._since is None:
            self._since = now
        left = self._since + self.total - now
        if left <= 0:
            return None
        # The exponent is bounded, since a float is.
        ceiling = min(MOST_S, FIRST_S * 2 ** min(self._attempts, 16))
        self._attempts += 1
        return min(max(random.uniform(0, ceiling), least), left)  # noqa: S311 -- jitter is no secret

    def reset(self) -> None:
        """Something was answered: the next failure is the first of its row."""
        self._attempts, self._since = 0, None

"""Bytes that everybody draws from, so that nobody can leave the others without."""

# Of what nobody holds, the part that one holder may have.
_SHARE = 8


class Budget:
    """`held` of `total` bytes; whoever holds some adds them and takes them away.

    One may hold an eighth of what is left, so that many who fill their share still leave room for those who come
    (Choudhury and Hahne, "Dynamic queue length thresholds", 1998). Use within one thread.
    """

    __slots__ = ("held", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0

    @property
    def share(self) -> int:
        """Bytes that one may hold now."""
        return (self.total - self.held) // _SHARE

    @property
    def most(self) -> int:
        """Bytes that one may hold where nobody holds any."""
        return self.total // _SHARE

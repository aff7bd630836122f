"""What a server that nobody disturbs answers, which is near what eager PyTorch answers."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from soak.errors import SoakError
from soak.work import Array, Work

import carousel_client as cc

# The blueprint's, for float32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reference:
    """A sequence, and the bytes of the answers to its chunks and to its end."""

    work: Work
    answers: tuple[bytes, ...]

    def differing(self, answers: Sequence[Array]) -> int:
        """Answers that are not the same bits, those that never came among them."""
        mine = [answer.tobytes() for answer in answers]
        missing = abs(len(self.answers) - len(mine))
        return missing + sum(one != other for one, other in zip(mine, self.answers, strict=False))


async def references(target: str, works: Sequence[Work]) -> tuple[list[Reference], float]:
    """Stream each sequence; the largest difference to eager PyTorch. Raises `SoakError` where it is over 1e-5."""

    async def stream(client: cc.aio.Client, work: Work) -> list[Array]:
        async with client.session(work.model, policy=work.policy) as session:
            return [np.asarray(answer) async for answer in session.stream(list(work.chunks))]

    async with cc.aio.connect(target) as client:
        answers = await asyncio.gather(*(stream(client, work) for work in works))
    worst = 0.0
    for work, mine in zip(works, answers, strict=True):
        eager, whole = work.eager(), np.concatenate(mine)
        if eager.shape != whole.shape:
            raise SoakError(f"{work.model} under {work.policy} answered {whole.shape}, eager PyTorch {eager.shape}")
        worst = max(worst, float(np.abs(np.subtract(whole, eager, dtype=np.float64)).max()))
    if not worst <= TOLERANCE:
        raise SoakError(f"the undisturbed server is {worst:.3g} off eager PyTorch, and {TOLERANCE:g} is allowed")
    found = [
        Reference(work, tuple(answer.tobytes() for answer in mine)) for work, mine in zip(works, answers, strict=True)
    ]
    return found, worst

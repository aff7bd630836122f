"""BentoML: one worker that keeps the states, a batchable API, frames as base64 in JSON."""

import base64
import os

import bentoml
from bench.peers.graph import Sessions
from pydantic import BaseModel


class Chunk(BaseModel):
    session: int
    frames: str


@bentoml.service(workers=1, traffic={"timeout": 60})
class Chunks:
    def __init__(self) -> None:
        self._sessions = Sessions(os.environ["BENCH_GRAPH"])

    @bentoml.api(route="/chunk", batchable=True, max_batch_size=64, max_latency_ms=60_000)
    def chunk(self, chunks: list[Chunk]) -> list[str]:
        frames = [base64.b64decode(chunk.frames) for chunk in chunks]
        answers = self._sessions.answer([chunk.session for chunk in chunks], frames)
        return [base64.b64encode(answer).decode() for answer in answers]

"""One measurement: so many sessions, in closed or open loop, for so long."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What one call of the client does in turn is a list of these, as JSON."""

    model: str
    # A workload file.
    workload: str
    sessions: int
    seconds: float
    # After every session has had its first answer.
    warmup: float
    # How the server is talked to; one of `bench.client.wires`, or "shared" for all sessions on one Carousel stream.
    wire: str
    # Poisson arrivals a second over all sessions together; 0 is a closed loop.
    rate: float = 0.0
    # Carousel sessions beside these, that were used once and stay open.
    idle: int = 0
    variant: str = "float32"
    policy: str = "carry"


@dataclass(frozen=True)
class Measured:
    """What came of a phase; the CPU seconds are the server's."""

    chunks_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_chunk: float
    memory_mb: float
    max_abs_error: float
    # The client's own, on the same cores.
    client_us_per_chunk: float
    # In open loop, chunks that arrived; 0 in closed loop.
    arrivals_per_s: float
    # Of Carousel's own statistics, over the same seconds; None for a peer.
    rows_per_step: float | None = None
    padding_waste: float | None = None
    step_ms: float | None = None
    run_us_per_chunk: float | None = None

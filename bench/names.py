"""What servers, parts and cases are called in the results; the documents are written from them without torch."""

OWN, SHARED, QUEUE, BY_HAND, EAGER, TRITON = (
    "Carousel, a stream each",
    "Carousel, one stream",
    "by hand, a queue",
    "by hand",
    "by hand, eager",
    "Triton",
)
CLOSED, ARRIVALS, LENGTHS, LOOKAHEAD, VARIANTS, OPENED, IDLE = (
    "closed loop",
    "arrivals",
    "chunk lengths",
    "lookahead",
    "variants",
    "open sessions",
    "idle sessions",
)
MIXED, TOKENS = "1–50 frames", "1 frame"
CARRY_8, CAUSAL_8, LOOKAHEAD_8 = "carry, 8 frames", "causal, 8 frames", "lookahead(8, 8)"
# Where a part does not vary the sessions.
SESSIONS = 128
IDLE_SESSIONS = 5_000

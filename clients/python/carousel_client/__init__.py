"""Carousel's client: recurrent models as stateful streams, NumPy in and out.

    import carousel_client as cc

    with cc.connect("localhost:8001") as client:
        with client.session("tagger") as session:
            for y in session.stream(chunks):
                ...
        y = client.infer("tagger", x)

`carousel_client.aio` is the same with `async with` and `async for`.
"""

from carousel_client import aio
from carousel_client.access import TLS
from carousel_client.client import Client, Session, connect
from carousel_client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    CarouselError,
    DeadlineExceeded,
    FailedPrecondition,
    Fenced,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SessionExpired,
    SessionNotFound,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from carousel_client.policies import Carry, Causal, Full, Lookahead, Policy

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "CarouselError",
    "Carry",
    "Causal",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Fenced",
    "Full",
    "Internal",
    "InvalidArgument",
    "Lookahead",
    "NotFound",
    "PermissionDenied",
    "Policy",
    "ResourceExhausted",
    "Session",
    "SessionExpired",
    "SessionNotFound",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "aio",
    "connect",
]

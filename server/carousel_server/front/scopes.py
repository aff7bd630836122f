"""What a caller needs for each call."""

from collections.abc import Mapping

from carousel_protos.v1 import carousel_pb2
from carousel_server.front.tokens import SCOPES, Scope

_API = carousel_pb2.DESCRIPTOR.services_by_name["Carousel"].full_name
ADMIN = frozenset[Scope](["admin"])
_INFER = frozenset[Scope](["infer"])
_NEEDED: Mapping[str, frozenset[Scope]] = {
    f"/{_API}/{method}": scopes
    for scopes, methods in (
        (_INFER, ("Stream", "Infer", "GetState", "PutState", "Fork", "ListSessions")),
        (SCOPES, ("ListModels", "GetModel")),
        (ADMIN, ("LoadModel", "UnloadModel")),
    )
    for method in methods
}
# A probe has no token, and learns no more than whether a model is served; the contract is public.
_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")


def needed(method: str) -> frozenset[Scope]:
    """The scopes of which a call needs one; none for what is open to all. What is not listed here is an admin's."""
    return frozenset() if method.startswith(_OPEN) else _NEEDED.get(method, ADMIN)

"""Errors of handlers become gRPC statuses here, once for all methods; no traceback ever leaves the process."""

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import grpc
from google.rpc.status_pb2 import Status

from carousel_server.errors import CarouselError
from carousel_server.front.status import to_status

log = logging.getLogger("carousel")

Handler = Any  # grpc.RpcMethodHandler has no fields in its type


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler: `CarouselError` aborts with its own status, anything else with INTERNAL and a log entry."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.stream_stream is not None:
            make, behavior = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        else:
            make, behavior = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        if not inspect.iscoroutinefunction(behavior):
            return handler  # health's Watch and reflection are generators, and raise none of ours
        return make(_guard(behavior), handler.request_deserializer, handler.response_serializer)


def _guard(behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except CarouselError as error:
            await abort(context, to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 (the last stand between a fault and a client)
            await abort(context, internal())

    return guarded


def internal() -> Status:
    """INTERNAL for the error being handled, which goes to the log under the number that the client is told."""
    number = uuid4().hex[:12]
    log.exception("error %s", number)  # noqa: LOG004 (called while an error is handled)
    error = CarouselError(f"internal error {number}; the server's log has it under this number", error=number)
    return to_status(error)


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: Status) -> None:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, status.message, trailing_metadata=details)

"""What every call passes through: it is let in, read, and its errors become gRPC statuses; no traceback ever leaves."""

import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn
from uuid import uuid4

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from carousel_server.errors import CarouselError, InvalidError
from carousel_server.front.guard import Guard
from carousel_server.front.scopes import needed
from carousel_server.front.status import to_status

log = logging.getLogger("carousel")

Handler = Any  # grpc.RpcMethodHandler has no fields in its type


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler: a caller is known before the request is read, a `CarouselError` aborts with its own status,
    anything else with INTERNAL and a log entry.
    """

    def __init__(self, guard: Guard, *, takes_admin: bool) -> None:
        self._guard = guard
        self._takes_admin = takes_admin

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
            # Health's Watch and reflection are generators, and raise none of ours.
            if needed(handler_call_details.method):
                raise TypeError(f"the handler of {handler_call_details.method} is no coroutine, and would go unguarded")
            return handler
        # What is no message is an error of the client's, told as such. A stream reads its requests itself, one by one.
        parse = None if handler.stream_stream is not None else handler.request_deserializer
        return make(self._wrap(handler_call_details.method, behavior, parse), None, handler.response_serializer)

    def _wrap(
        self,
        method: str,
        behavior: Callable[[Any, Any], Coroutine[Any, Any, Any]],
        parse: Callable[[bytes], Any] | None,
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def wrapped(request: Any, context: Any) -> Any:
            try:
                ticket = self._guard.admit(method, context, takes_admin=self._takes_admin)
                if parse is not None:
                    return await behavior(_parse(parse, request), context)
                return await self._guard.serve(method, ticket, behavior(request, context))
            except CarouselError as error:
                status = to_status(error)
            except grpc.aio.AbortError:
                raise
            except Exception:  # noqa: BLE001 (the last stand between a fault and a client)
                status = internal()
            # What abort raises, gRPC leaves in a cycle with this frame: the request is not to stay with it until the
            # collector comes.
            del request
            return await abort(context, status)

        return wrapped


def _parse(parse: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return parse(request)
    except DecodeError as error:
        raise InvalidError("the request is no message of this method; generate the client anew") from error


def internal() -> Status:
    """INTERNAL for the error being handled, which goes to the log under the number that the client is told."""
    number = uuid4().hex[:12]
    log.exception("error %s", number)  # noqa: LOG004 (called while an error is handled)
    error = CarouselError(f"internal error {number}; the server's log has it under this number", error=number)
    return to_status(error)


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: Status) -> NoReturn:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, status.message, trailing_metadata=details)

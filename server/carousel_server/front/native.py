"""The native API, `carousel.v1.Carousel`: a thin skin over the engine."""

import time
from itertools import islice
from typing import Any

import grpc
import numpy as np

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselServicer
from carousel_server.engine.catalogue import Entry
from carousel_server.engine.codec import decode, encode
from carousel_server.engine.engine import Engine
from carousel_server.engine.model import Model
from carousel_server.engine.view import SessionView
from carousel_server.front.guard import Guard, caller
from carousel_server.front.stream import Context, StreamCall

# Sessions that one answer of ListSessions holds, at most.
_PAGE = 1000
# Sessions that an answer of UnloadModel names, at most.
_STAYING = 100

Unary = grpc.aio.ServicerContext[Any, Any]


class NativeServicer(CarouselServicer):
    """Answers `carousel.v1.Carousel`; errors are raised as `CarouselError` and mapped by the interceptor."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        self._engine = engine
        self._guard = guard
        self._calls: set[StreamCall] = set()
        # The deadline that streams were told, in Unix milliseconds.
        self._going_away: int | None = None

    async def Stream(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]  # noqa: ARG002
        call = StreamCall(self._engine, context)
        self._calls.add(call)
        if self._going_away is not None:
            call.going_away(self._going_away)
            if self._engine.cold is not None:
                call.hand_over()
        try:
            await call.serve()
        finally:
            self._calls.discard(call)

    def announce(self, drain_s: float) -> None:
        """Tell every stream that the server will stop, also those that come later.

        With a store, they end as soon as what they asked is answered: any server can go on with their sessions.
        """
        self._going_away = int((time.time() + drain_s) * 1000)
        for call in self._calls:
            call.going_away(self._going_away)
            if self._engine.cold is not None:
                call.hand_over()

    async def Infer(self, request: pb.InferRequest, context: Unary) -> pb.InferResponse:  # noqa: ARG002
        spec = self._engine.catalogue.get(request.model, request.version).spec
        tensors = decode(request.tensors, [port.name for port in (*spec.inputs, *spec.contexts)])
        lengths = np.array(request.lengths, np.int32) if request.lengths else None
        with self._guard.rows(max((array.shape[0] for array in tensors.values() if array.ndim), default=0)):
            outputs, version = await self._engine.infer(
                request.model, request.version, tensors, lengths, variant=request.variant
            )
        return pb.InferResponse(tensors=[encode(port, outputs[port.name]) for port in spec.outputs], version=version)

    async def GetState(self, request: pb.GetStateRequest, context: Unary) -> pb.GetStateResponse:  # noqa: ARG002
        return pb.GetStateResponse(state=await self._engine.get_state(request.session_id, owner=caller().name))

    async def PutState(self, request: pb.PutStateRequest, context: Unary) -> pb.PutStateResponse:  # noqa: ARG002
        view = await self._engine.put_state(
            request.state,
            session_id=request.session_id,
            version=request.version,
            move=request.move,
            owner=caller().name,
        )
        return pb.PutStateResponse(session=_info(view))

    async def Fork(self, request: pb.ForkRequest, context: Unary) -> pb.ForkResponse:  # noqa: ARG002
        forked = await self._engine.fork(request.session_id, request.new_session_id, owner=caller().name)
        return pb.ForkResponse(session=_info(forked))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Unary) -> pb.ListSessionsResponse:  # noqa: ARG002
        most = min(request.page_size or _PAGE, _PAGE)
        found = await self._engine.list_sessions(
            model=request.model, after=request.page_token, most=most + 1, owner=caller().name
        )
        infos = [_info(view) for view in found[:most]]
        token = infos[-1].session_id if len(found) > most else ""
        return pb.ListSessionsResponse(sessions=infos, next_page_token=token)

    async def ListModels(self, request: pb.ListModelsRequest, context: Unary) -> pb.ListModelsResponse:  # noqa: ARG002
        await self._engine.catalogue.refresh()
        return pb.ListModelsResponse(models=map(_status, self._engine.catalogue.entries()))

    async def GetModel(self, request: pb.GetModelRequest, context: Unary) -> pb.GetModelResponse:  # noqa: ARG002
        await self._engine.catalogue.refresh()
        entry = self._engine.catalogue.entry(request.model, request.version)
        if entry.model is None:
            return pb.GetModelResponse(status=_status(entry))
        return pb.GetModelResponse(
            status=_status(entry), manifest=entry.model.manifest, statistics=_statistics(entry.model)
        )

    async def LoadModel(self, request: pb.LoadModelRequest, context: Unary) -> pb.LoadModelResponse:  # noqa: ARG002
        return pb.LoadModelResponse(status=_status(await self._engine.load(request.model, request.version)))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Unary) -> pb.UnloadModelResponse:  # noqa: ARG002
        retired = await self._engine.unload(
            request.model,
            request.version,
            within_s=request.deadline_s if request.HasField("deadline_s") else None,
            move=request.move,
            move_to=request.move_to,
        )
        staying = [
            pb.Staying(session_id=session_id, reason=reason)
            for session_id, reason in islice(retired.staying.items(), _STAYING)
        ]
        return pb.UnloadModelResponse(
            models=map(_status, retired.entries),
            moved=retired.moved,
            staying=staying,
            staying_sessions=len(retired.staying),
        )


def _info(view: SessionView) -> pb.SessionInfo:
    return pb.SessionInfo(
        session_id=view.session_id,
        model=view.model,
        version=view.version,
        variant=view.variant,
        policy=view.blocking.message(),
        epoch=view.epoch,
        next_index=view.next_index,
        idle_s=view.idle_s,
        attached=view.attached,
    )


def _status(entry: Entry) -> pb.ModelStatus:
    return pb.ModelStatus(
        name=entry.name,
        version=entry.version,
        state=entry.state,
        reason=entry.reason,
        open_sessions=entry.model.open_sessions if entry.model is not None else 0,
        deadline_unix_ms=int(entry.deadline * 1000),
    )


def _statistics(model: Model) -> pb.Statistics:
    counted = model.steps.counters
    return pb.Statistics(
        steps=counted.steps,
        rows=counted.rows,
        frames=counted.frames,
        padded_frames=counted.padded_frames,
        open_sessions=model.open_sessions,
        run_seconds=counted.run_seconds,
        max_rows=counted.max_rows,
    )

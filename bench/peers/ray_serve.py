"""Ray Serve: one replica that keeps the states, `@serve.batch` in front of the model, HTTP."""

import argparse
import threading

import ray
from bench.peers.graph import Sessions
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=2048)
class Chunks:
    def __init__(self, graph: str) -> None:
        self._sessions = Sessions(graph)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0)
    async def _answer(self, asked: list[tuple[int, bytes]]) -> list[bytes]:
        return self._sessions.answer([number for number, _ in asked], [chunk for _, chunk in asked])

    async def __call__(self, request: Request) -> Response:
        return Response(await self._answer((int(request.headers["x-session"]), await request.body())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graph", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    ray.init(include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    serve.run(Chunks.bind(given.graph), route_prefix="/chunk")
    print(f"listening on 127.0.0.1:{given.port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()

"""What a user writes first: a grpc.aio handler that keeps h and c and calls the model for each chunk, no batching.

`--engine onnxruntime` or `eager`. Bytes in, bytes out: it is spared protobuf.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import uvloop
from bench.sizes import SIZES

Answer = Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]


def onnxruntime_answer(graph: Path) -> Answer:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph, options)
    h, c = (node for node in session.get_inputs() if node.name.endswith(("h_0", "c_0")))
    zeros = np.zeros((1, *h.shape[1:]), np.float32)

    def answer(x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        before = state or (zeros, zeros)
        feeds = {"x": x[None], "lengths": np.array([len(x)], np.int32), h.name: before[0], c.name: before[1]}
        y, *after = session.run(None, feeds)
        return y[0], after

    return answer


def eager_answer(model: str) -> Answer:
    import torch  # noqa: PLC0415 -- the others are spared its start and its memory
    from bench.models import make  # noqa: PLC0415

    torch.set_num_threads(1)
    stack = make(model)

    @torch.inference_mode()
    def answer(x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        y, after = stack(torch.from_numpy(x.copy())[None], state)
        return y[0].numpy(), after

    return answer


def serve(answer: Answer, features: int) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]:
    async def stream(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        state = None
        async for request in requests:
            x = np.frombuffer(request, np.float32).reshape(-1, features)
            y, state = await asyncio.to_thread(answer, x, state)
            yield y.tobytes()

    return stream


async def run(behavior: Any) -> None:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(behavior)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("byhand", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--model", choices=SIZES, required=True)
    return parser


def main() -> None:
    parser = arguments()
    parser.add_argument("--engine", choices=["onnxruntime", "eager"], default="onnxruntime")
    given = parser.parse_args()
    answer = eager_answer(given.model) if given.engine == "eager" else onnxruntime_answer(given.graph)
    uvloop.run(run(serve(answer, SIZES[given.model][0])))


if __name__ == "__main__":
    main()

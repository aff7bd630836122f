"""MLServer: a runtime of its own in one process, which keeps the states; adaptive batching, gRPC with raw tensors.

Rows of one batch are told apart by the `session` tensor, which is batched as `x` is.
"""

import argparse
import asyncio

import numpy as np
from bench.peers.graph import Sessions
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse


class Chunks(MLModel):
    async def load(self) -> bool:
        self._sessions = Sessions(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        tensors = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        answers = self._sessions.answer(tensors["session"].ravel().tolist(), list(tensors["x"]))
        y = np.frombuffer(b"".join(answers), np.float32).reshape(len(answers), -1, 32)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])


async def serve(name: str, graph: str, ports: list[int]) -> None:
    grpc, http, metrics = ports
    settings = Settings(
        host="127.0.0.1",
        grpc_port=grpc,
        http_port=http,
        metrics_port=metrics,
        metrics_endpoint=None,
        parallel_workers=0,
    )
    model = ModelSettings(
        name=name,
        implementation=Chunks,
        max_batch_size=64,
        # Seconds that a batch waits for more; the least that still makes batches.
        max_batch_time=0.001,
        parameters=ModelParameters(uri=graph),
    )
    await MLServer(settings).start([model])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--graph", required=True)
    parser.add_argument("--ports", type=int, nargs=3, required=True)
    given = parser.parse_args()
    asyncio.run(serve(given.name, given.graph, given.ports))


if __name__ == "__main__":
    main()

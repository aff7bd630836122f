"""LitServe: one worker that keeps the states, its own batching, frames as base64 in JSON."""

import argparse
import base64
from typing import Any

import litserve
from bench.peers.graph import Sessions


class Chunks(litserve.LitAPI):
    def __init__(self, graph: str) -> None:
        super().__init__(max_batch_size=64, batch_timeout=0.001, api_path="/chunk")
        self._graph = graph

    def setup(self, device: str) -> None:  # noqa: ARG002 -- LitServe's signature
        self._sessions = Sessions(self._graph)

    def decode_request(self, request: dict[str, Any]) -> tuple[int, bytes]:
        return request["session"], base64.b64decode(request["frames"])

    def batch(self, inputs: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        return inputs

    def predict(self, x: list[tuple[int, bytes]]) -> list[bytes]:
        return self._sessions.answer([number for number, _ in x], [chunk for _, chunk in x])

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> str:
        return base64.b64encode(output).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graph", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    server = litserve.LitServer(Chunks(given.graph), accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=given.port, generate_client_file=False, log_level="info")


if __name__ == "__main__":
    main()

"""Triton's Python backend: onnxruntime on whatever the sequence batcher brings, h and c kept by sequence id."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from bench.peers.graph import Sessions


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._sessions = Sessions(parameters["graph"]["string_value"])

    def execute(self, requests: list) -> list:
        ids = [_tensor(request, "CORRID").item() for request in requests]
        answers = self._sessions.answer(ids, [_tensor(request, "x") for request in requests])
        for number, request in zip(ids, requests, strict=True):
            if _tensor(request, "END").item():
                self._sessions.forget(number)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", np.frombuffer(answer, np.float32).reshape(1, -1, 32))])
            for answer in answers
        ]


def _tensor(request, name: str) -> np.ndarray:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

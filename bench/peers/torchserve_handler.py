"""TorchServe: a handler in one worker that keeps the states; TorchServe makes the batches."""

from typing import Any

from bench.peers.graph import Sessions

_sessions: list[Sessions] = []


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[bytes] | None:
    """TorchServe calls it once without data, and then for each batch."""
    if not _sessions:
        _sessions.append(Sessions(context.model_yaml_config["graph"]))
    if data is None:
        return None
    ids = [int(context.get_request_header(number, "X-Session")) for number in range(len(data))]
    return _sessions[0].answer(ids, [asked["body"] for asked in data])

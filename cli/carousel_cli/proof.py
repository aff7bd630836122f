"""The parity proof as a table for the terminal."""

import json
from collections import defaultdict
from typing import Any

from google.protobuf import json_format
from rich.table import Table

from carousel_cli.common import policy_text
from carousel_protos import Bundle
from carousel_protos.v1.manifest_pb2 import Policy


def read_proof(bundle: Bundle) -> dict[str, Any]:
    """The content of the bundle's parity.json."""
    proof: dict[str, Any] = json.loads(bundle.file("parity.json").read_text(encoding="utf-8"))
    return proof


def proof_table(proof: dict[str, Any], title: str) -> Table:
    """For each policy the frames that were compared, and each runtime's largest error over all outputs and states."""
    runtimes = sorted({check["runtime"] for check in proof["checks"]})
    frames: dict[str, int] = defaultdict(int)
    errors: dict[tuple[str, str], float] = defaultdict(float)
    first = proof["checks"][0]
    for check in proof["checks"]:
        policy = policy_text(json_format.ParseDict(check["policy"], Policy()))
        if (check["runtime"], check["output"]) == (first["runtime"], first["output"]):
            frames[policy] += check["frames"]
        errors[policy, check["runtime"]] = max(errors[policy, check["runtime"]], check["max_abs_error"])
    table = Table("policy", title=title, title_justify="left", caption_justify="left")
    table.caption = f"tolerance {proof['tolerance']:.0e}, largest {proof['maximum']:.2e}, {proof['seconds']:.1f} s"
    table.add_column("frames", justify="right")
    for runtime in runtimes:
        table.add_column(f"{runtime}, max |error|", justify="right")
    for policy, count in frames.items():
        table.add_row(policy, f"{count:,}", *(f"{errors[policy, runtime]:.2e}" for runtime in runtimes))
    return table


def variants_table(proof: dict[str, Any]) -> Table | None:
    """Each variant's size, speed and error beside float32; None where there is none."""
    if not proof.get("variants"):
        return None
    table = Table("variant", title="Variants", title_justify="left")
    for heading in ("bytes", "of float32", "speed", "max |error|", "tolerance"):
        table.add_column(heading, justify="right")
    for entry in proof["variants"]:
        part = entry["bytes"] / entry["bytes_float32"]
        errors = (f"{entry['maximum']:.2e}", f"{entry['tolerance']:.1e}")
        table.add_row(entry["variant"], f"{entry['bytes']:,}", f"{part:.0%}", f"{entry['speed']:.2f}×", *errors)
    return table

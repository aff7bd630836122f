"""Bundles as an attacker would write them: nothing but a bundle's own, listed and unchanged files is ever read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import grpc
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data
from tests.support.stream import reason, rpc_status

from carousel_protos import Bundle, BundleError
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.config import ServerConfig
from carousel_server.serve import serving


@pytest.fixture
def bundle(models: Path, tmp_path: Path) -> Path:
    """A copy of `speaker`, to be tampered with, and beside it a file that is none of its business."""
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    shutil.copytree(models / "speaker" / "1", tmp_path / "models" / "evil" / "1")
    return tmp_path / "models" / "evil" / "1"


def list_file(bundle: Path, name: str, content: Path) -> None:
    """List a file in the manifest with its true sha256, as an attacker who can write the manifest would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    kept = [entry for entry in manifest["files"] if entry["path"] != name]
    entry = {"path": name, "sha256": sha256(content.read_bytes()).hexdigest(), "bytes": str(content.stat().st_size)}
    manifest["files"] = [*kept, entry]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def rewrite(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the graph, and have the manifest agree."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    list_file(bundle, "model.onnx", bundle / "model.onnx")


def point(tensor: TensorProto, location: str) -> TensorProto:
    """The tensor's values lie at `location`."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    return tensor


def outside() -> TensorProto:
    return point(TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4]), "../../../secret.bin")


def constant() -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["stolen"], value=outside())


def in_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(outside())


def in_sparse_initializer(model: onnx.ModelProto) -> None:
    indices = numpy_helper.from_array(numpy_helper.to_array(helper.make_tensor("i", TensorProto.INT64, [1], [0])))
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=outside(), indices=indices, dims=[9]))


def in_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(constant())


def in_subgraph(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([constant()], "branch", [], [])
    inner = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    outer = helper.make_graph([inner], "outer", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=outer, else_branch=outer))


def in_function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function("own", "f", [], ["stolen"], [constant()], [helper.make_opsetid("", 18)])
    )


def in_training(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(outside())


@pytest.mark.parametrize(
    "hide", [in_initializer, in_sparse_initializer, in_constant, in_subgraph, in_function, in_training]
)
def test_weights_outside_are_found_wherever_a_graph_hides_them(bundle: Path, hide: Callable[[onnx.ModelProto], None]):
    """External data beyond the bundle is refused in initialisers, constants, subgraphs, functions and training."""
    rewrite(bundle, hide)
    with pytest.raises(BundleError, match=r"takes weights from '\.\./\.\./\.\./secret\.bin'"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "location",
    ["../../../secret.bin", "/etc/passwd", "link.bin", "sub/weights.bin", "./model.onnx", "unlisted.bin", ""],
)
async def test_a_server_refuses_weights_that_are_not_the_bundles_own(
    bundle: Path, models: Path, config: ServerConfig, location: str
):
    """Paths up, absolute paths, links, folders and files that the manifest does not list are refused when loaded; the
    other models are served."""
    (bundle / "link.bin").symlink_to(bundle / "../../../secret.bin")
    (bundle / "unlisted.bin").write_bytes(bytes(64))
    shutil.copytree(models / "tagger", bundle.parents[1] / "tagger")
    rewrite(bundle, lambda model: point(model.graph.initializer[0], location) and None)
    async with (
        serving(replace(config, models=bundle.parents[1])) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CarouselStub(channel).LoadModel(pb.LoadModelRequest(model="evil"))
        states = {model.name: model.state for model in server.engine.catalogue.entries()}
    status = rpc_status(caught.value)
    assert (caught.value.code(), reason(status)) == (grpc.StatusCode.FAILED_PRECONDITION, "LOAD_FAILED")
    assert f"takes weights from {location!r}: only files of the bundle's own" in status.message
    assert "secret" not in status.message.replace("../secret.bin", "")
    assert states == {"evil": pb.MODEL_STATE_FAILED, "tagger": pb.MODEL_STATE_SERVING}


def externalise(bundle: Path) -> None:
    """Move the weights into weights.bin, inside the bundle and listed."""
    model = onnx.load(bundle / "model.onnx")
    convert_model_to_external_data(model, location="weights.bin", size_threshold=200)
    onnx.save(model, bundle / "model.onnx")
    assert (bundle / "weights.bin").stat().st_size > 1000
    for name in ("model.onnx", "weights.bin"):
        list_file(bundle, name, bundle / name)


async def test_weights_in_a_listed_file_of_the_bundle_are_served(bundle: Path, config: ServerConfig):
    """External data inside the bundle is loaded, proven by the golden vectors, and guarded by its own sha256."""
    externalise(bundle)
    async with serving(replace(config, models=bundle.parents[1])) as server:
        assert server.engine.catalogue.get("evil").version == "1"
    with (bundle / "weights.bin").open("r+b") as weights:
        weights.write(b"\x00\x00\x80\x3f")
    with pytest.raises(BundleError, match=r"weights\.bin is not the file that was exported"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../../../secret.bin", "{outside}", "sub/../../../../secret.bin", "..", ".", ""])
def test_a_manifest_names_files_of_its_own_folder_alone(bundle: Path, tmp_path: Path, name: str):
    """A listed file that lies elsewhere is refused, though its sha256 is right."""
    list_file(bundle, name.format(outside=tmp_path / "secret.bin"), tmp_path / "secret.bin")
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_links_are_not_followed(bundle: Path, tmp_path: Path):
    """A listed file that is a link is refused, though what it leads to is what was exported."""
    (bundle / "model.onnx").rename(tmp_path / "model.onnx")
    (bundle / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="are no links"):
        Bundle.open(bundle)


def test_a_file_changed_after_the_export_is_refused(bundle: Path):
    """One bit of a weight is enough."""
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="its sha256 differs"):
        Bundle.open(bundle)


async def test_a_graph_is_read_as_onnx_whatever_its_name(bundle: Path, config: ServerConfig):
    """A file in onnxruntime's own format is not loaded by giving it that format's name: nothing in it was checked."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(bundle / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(bundle / "model.onnx", options)
    manifest = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(manifest.replace('"file": "model.onnx"', '"file": "model.ort"'))
    list_file(bundle, "model.ort", bundle / "model.ort")
    with pytest.raises(BundleError, match="no ONNX file"):
        Bundle.open(bundle)
    shutil.copy(bundle / "model.onnx", bundle / "model.ort")
    list_file(bundle, "model.ort", bundle / "model.ort")
    async with serving(replace(config, models=bundle.parents[1])) as server:
        assert server.engine.catalogue.get("evil").version == "1"


@pytest.mark.parametrize("name", ["../models/evil", "/etc", "..", "evil/1", "evil\x00"])
async def test_a_model_is_a_name_and_no_path(bundle: Path, config: ServerConfig, name: str):
    """What a client asks to load is looked up among the models that are there; no path is made of it."""
    async with (
        serving(replace(config, models=bundle.parents[1])) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = CarouselStub(channel)
        for request in (pb.LoadModelRequest(model=name), pb.LoadModelRequest(model="evil", version=name)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.LoadModel(request)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND

"""The report shows everything that a bundle and its parity say, and nothing of it as markup."""

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from carousel_export.charts import Axis, Chart, Line
from carousel_export.report import policy_name, render
from carousel_protos.v1 import manifest_pb2 as pb

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</td><script>alert('x')</script>&\"$x^2$"


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; collects text, elements and ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def tables(self) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def make_manifest(name: str = "tagger", output: str = "logits") -> pb.Manifest:
    lookahead = pb.Policy(kind=pb.POLICY_KIND_LOOKAHEAD, block=8, ahead=4)
    return pb.Manifest(
        format=1,
        name=name,
        version="3",
        files=[
            pb.File(path="model.onnx", sha256="ab" * 32, bytes=1_620_304),
            pb.File(path="model.pt", sha256="cd" * 32, bytes=1_702_000),
            pb.File(path="parity.json", sha256="ef" * 32, bytes=812),
        ],
        inputs=[
            pb.TensorSpec(name="tokens", dtype=pb.DATA_TYPE_INT64, dims=["batch", "time"], eager_dims=["batch", "time"])
        ],
        outputs=[
            pb.TensorSpec(
                name=output,
                dtype=pb.DATA_TYPE_FLOAT32,
                dims=["batch", "time", "876"],
                eager_dims=["batch", "time", "876"],
            )
        ],
        states=[
            pb.StateSpec(
                input=f"lstm.{part}_0",
                output=f"lstm.{part}_n",
                dtype=pb.DATA_TYPE_FLOAT32,
                dims=["batch", "2", "32"],
                layer="lstm",
            )
            for part in "hc"
        ],
        lengths="lengths",
        policies=[pb.Policy(kind=pb.POLICY_KIND_CARRY), lookahead, pb.Policy(kind=pb.POLICY_KIND_FULL)],
        default_policy=lookahead,
        ragged=True,
        layers=[
            pb.RecurrentLayer(
                name="lstm",
                kind="LSTM",
                input_size=64,
                hidden_size=32,
                num_layers=1,
                num_directions=2,
                parameters=25_088,
                trainable_parameters=12_544,
                layer_parameters=[25_088],
                state_bytes=512,
                flops_per_frame=49_152,
            )
        ],
        parameters=443_628,
        trainable_parameters=430_084,
        flops_per_frame=105_216,
        labels={output: pb.Labels(values=[f"label{i}" for i in range(20)])},
        metadata={"licence": "Apache-2.0"},
        tolerance=pb.Tolerance(absolute=1e-5),
        made_with={"torch": "2.13.0", "onnxruntime": "1.31.1"},
    )


def make_parity(output: str = "logits", worst: float = 3.1e-7) -> dict[str, Any]:
    policies: list[dict[str, Any]] = [
        {"kind": "POLICY_KIND_CARRY", "block": 5},
        {"kind": "POLICY_KIND_LOOKAHEAD", "block": 8, "ahead": 4},
        {"kind": "POLICY_KIND_FULL"},
    ]
    checks = [
        {
            "policy": policy,
            "runtime": runtime,
            "output": output,
            "sequences": 12 + i,
            "frames": 1234 + i,
            "what": what,
            "max_abs_error": (error := worst if (i, runtime) == (1, "onnxruntime") else (2.1 + i) * 1e-7),
            "share": error / 1e-5,
            "mean_abs_error": (3.3 + i) * 1e-8,
            "worst": {"sequence": i, "frame": 70 + i, "element": [i], "wanted": 0.1, "got": 0.1 + 2e-7},
        }
        for i, policy in enumerate(policies)
        for runtime in ("onnxruntime", "torchscript")
        for what in ("ragged batch, random cuts, non-zero state", "one frame", "one long sequence")
    ]
    over_time = [
        {
            "policy": policy,
            "runtime": runtime,
            "output": output,
            "frame": list(range(600)),
            "max_abs_error": [0.0 if t % 17 == 0 else 1e-7 * (1.2 + i + math.sin(t / 9 + i)) for t in range(600)],
        }
        for i, policy in enumerate(policies)
        for runtime in ("onnxruntime", "torchscript")
    ]
    carry = {"kind": "POLICY_KIND_CARRY", "block": 1}
    curve: list[dict[str, Any]] = [{"policy": carry, "argmax_agreement": 0.931, "cost": 1.0, "latency_frames": 1}]
    settings = [(1, 1, 0.99), (1, 8, 0.9976), (8, 0, 0.97), (8, 4, 0.9994), (8, 8, 1.0), (8, 32, 1.0)]
    for block, ahead, agreement in settings:
        curve.append(
            {
                "policy": {"kind": "POLICY_KIND_LOOKAHEAD", "block": block, "ahead": ahead},
                "argmax_agreement": agreement,
                "cost": (block + ahead) / block,
                "latency_frames": block + ahead,
            }
        )
    for i, point in enumerate(curve):
        point |= {"output": output, "max_abs_difference": 0.21 / (1 + i), "rms_relative_difference": 0.011 / (1 + i)}
    return {
        "tolerance": 1e-5,
        "maximum": worst,
        "share": worst / 1e-5,
        "seconds": 4.2,
        "checks": checks,
        "error_over_time": over_time,
        "lookahead_curve": curve,
    }


def test_page_is_well_formed_and_loads_nothing() -> None:
    """The page is one well-formed document with unique ids, without scripts, and with no address to fetch from."""
    html = render(make_manifest(), make_parity())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.elements[0] == ("html", {"lang": "en"})
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_manifest_is_shown() -> None:
    """Model, tensors, states, layers, parameters, policies, files with their sha256 and versions are on the page."""
    manifest = make_manifest()
    page = Page(render(manifest, make_parity()))
    words, rows = page.words(), page.tables()
    assert "tagger version 3" in words
    assert "443,628" in words
    assert "512 B" in words  # 2 states × 2 directions × 32 × 4 bytes
    assert ["tokens", "int64", "[batch, time]", "[batch, time]"] in rows
    assert ["lstm.h_0 → lstm.h_n", "float32", "[batch, 2, 32]", "of lstm"] in rows
    layer = ["lstm", "LSTM", "64", "32", "1", "2", "25,088", "25,088", "12,544", "512 B", "49,152"]
    assert layer in rows
    assert "430,084" in words
    assert "105,216" in words
    assert ["model.onnx", "1.6 MB", "ab" * 32] in rows
    assert ["parity.json", "812 B", "ef" * 32] in rows
    assert {"carry", "lookahead(8, 4)", "full"} <= {row[0] for row in rows}
    for text in ("torch", "2.13.0", "onnxruntime", "1.31.1", "licence", "Apache-2.0", "label0, label1"):
        assert text in words


def test_every_figure_of_parity_is_shown() -> None:
    """Every check, every line of the error over time and every point of the curve has its figures in a table."""
    parity = make_parity()
    page = Page(render(make_manifest(), parity))
    rows, words = page.tables(), page.words()
    assert "Within tolerance" in words
    assert "4.2 s" in words
    group = ""
    shown: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        group = row[0] if len(row) == 1 else group
        if len(row) == 5 and " in " in group:
            shown[group, row[0]] = [float(cell.replace(",", "")) for cell in row[1:]]
    assert len(shown) == len(parity["checks"])
    for check in parity["checks"]:
        worst = check["worst"]
        what = (
            f"{check['what']} logits, worst at sequence {worst['sequence']}, frame {worst['frame']}, "
            f"element {worst['element']}: 0.1000002 for 0.1"
        )
        figures = [check[key] for key in ("sequences", "frames", "max_abs_error", "mean_abs_error")]
        assert shown[f"{policy_name(check['policy'])} in {check['runtime']}", what] == pytest.approx(figures, rel=0.05)
    for entry in parity["error_over_time"]:
        (row,) = [row for row in rows if row[:2] == [policy_name(entry["policy"]), entry["runtime"]]]
        high = max(entry["max_abs_error"])
        assert float(row[3]) == pytest.approx(high, rel=0.05)
        assert int(row[4]) == entry["max_abs_error"].index(high)
    for point in parity["lookahead_curve"]:
        (row,) = [row for row in rows if row[0] == policy_name(point["policy"]) and len(row) == 6]
        assert float(row[1].removesuffix(" %")) == pytest.approx(100 * point["argmax_agreement"])
        assert float(row[2]) == pytest.approx(point["max_abs_difference"], rel=0.05)
        assert float(row[3].removesuffix(" %")) == pytest.approx(100 * point["rms_relative_difference"], rel=0.05)
        assert float(row[4]) == pytest.approx(point["cost"], abs=0.005)
        assert int(row[5]) == point["latency_frames"]


def test_every_series_is_drawn() -> None:
    """The charts hold one line for each series, inside the picture, and one mark for each lookahead point."""
    page = Page(render(make_manifest(), make_parity()))
    lines = [attributes["points"] or "" for tag, attributes in page.elements if tag == "polyline"]
    assert len(lines) == 6 + 2 * 3  # error over time; two charts of carry(1), block 1 and block 8
    for line in lines:
        for point in line.split():
            x, y = map(float, point.split(","))
            assert Chart.left <= x <= Chart.right
            assert Chart.top <= y <= Chart.bottom
    assert sum(tag == "circle" for tag, _ in page.elements) == 3 * 6  # the third stands in the table


def test_over_tolerance_is_said() -> None:
    """A check over the tolerance, or one that is not a number, turns the verdict, whatever `maximum` says."""
    for worst in (2e-5, math.nan, math.inf):
        parity = make_parity(worst=worst) | {"maximum": 0.0}
        words = Page(render(make_manifest(), parity)).words()
        assert "Over tolerance" in words
        assert "Within tolerance" not in words


def test_names_are_escaped() -> None:
    """Names that look like markup are shown as they are, and add no element."""
    plain = Page(render(make_manifest(), make_parity()))
    manifest, parity = make_manifest(HOSTILE, HOSTILE), make_parity(HOSTILE)
    manifest.metadata[HOSTILE] = HOSTILE
    manifest.metadata.pop("licence")
    manifest.layers[0].name = manifest.files[0].path = HOSTILE
    for check in parity["checks"]:
        check["what"] = HOSTILE
    hostile = Page(render(manifest, parity))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.words().count("</td><script>") > 10


def test_causal_model_has_no_curve() -> None:
    """A model without backward directions has no section about looking ahead."""
    parity = make_parity()
    del parity["lookahead_curve"]
    assert "looking ahead" not in Page(render(make_manifest(), parity)).words()


def test_report_reads_parity_from_disk() -> None:
    """What went through `parity.json` gives the same page."""
    parity = make_parity()
    assert render(make_manifest(), json.loads(json.dumps(parity))) == render(make_manifest(), parity)


@pytest.mark.parametrize("agreement", [0.99999, 0.999951])
def test_agreement_is_never_rounded_up_to_all(agreement: float) -> None:
    """An agreement short of 100 % is not printed as 100 %."""
    parity = make_parity()
    parity["lookahead_curve"] = parity["lookahead_curve"][:1]
    parity["lookahead_curve"][0]["argmax_agreement"] = agreement
    assert "99.99 %" in Page(render(make_manifest(), parity)).words()


def test_thinning_keeps_peaks() -> None:
    """A long series is drawn with at most 100 points, and its highest value is one of them."""
    points = [(float(t), 9e-6 if t == 7777 else 1e-7) for t in range(20_000)]
    axis = Axis.decades("error", [y for _, y in points])
    chart = Chart("", Axis.linear("frame", 20_000), axis, [])
    pixels = chart.pixels(Line(points, 0))
    assert len(pixels) <= 100
    assert min(y for _, y in pixels) == chart.down(9e-6)

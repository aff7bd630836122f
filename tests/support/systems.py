"""README's table of supported models, written from the tests that prove each row: `make systems`, or `--check`.

A test says what it shows with `@pytest.mark.system(ROW, WHAT)`. A row without a test is left out of the table.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- systems: written by make systems -->", "<!-- end of systems -->"
ROWS = {
    "1": "`nn.LSTM`, every constructor argument",
    "2": "`nn.GRU`",
    "3": "`nn.RNN`",
    "4": "`LSTMCell`, `GRUCell`, `RNNCell` in a Python loop over time",
    "5": "a BiLSTM written by hand from two LSTMCells",
    "6": "a multi-layer BiLSTM of LSTMCells whose directions are stacked separately",
    "7": "row-by-row image classifier",
    "8": "sentiment: embedding → BiLSTM → pooled → linear",
    "9": "BiLSTM with attention over time",
    "10": "BiLSTM-CRF",
    "11": "language model, states kept between calls",
    "12": "sequence to sequence: bidirectional GRU encoder, attention decoder",
    "13": "`pack_padded_sequence` and `pad_packed_sequence`",
    "14": "convolution over time before the LSTM",
    "15": "frozen, weight_norm'ed and tied weights",
    "16": "a TorchScript or ONNX file that somebody else made",
    "17": "TorchScript served",
}


class Collector:
    """A pytest plugin that notes what the collected tests show, by row."""

    def __init__(self) -> None:
        self.shown: dict[str, dict[str, None]] = defaultdict(dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("system"):
                row, what = marker.args
                self.shown[str(row)][what] = None


def table(shown: dict[str, dict[str, None]]) -> str:
    if unknown := shown.keys() - ROWS.keys():
        sys.exit(f"tests name systems that have no row: {', '.join(sorted(unknown))}")
    lines = ["| model | what a test shows, from eager to the client of a real server |", "|---|---|"]
    lines += [f"| {ROWS[row]} | {'; '.join(shown[row])} |" for row in ROWS if row in shown]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is stale")
    check = parser.parse_args().check
    collector = Collector()
    if pytest.main(["--collect-only", "-qq", "--no-header", str(ROOT / "tests" / "systems")], plugins=[collector]):
        sys.exit("the tests cannot be collected")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{table(collector.shown)}\n{END}{after}"
    if check and wanted != text:
        sys.exit("README's table of supported models is stale; run `make systems` and commit")
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()

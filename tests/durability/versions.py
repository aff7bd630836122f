"""Versions of two models, and what eager PyTorch answers to a sequence that changes version on its way."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tests.support.models import Speaker, Tagger, make
from torch import nn

import carousel_export as cx

# The seed of each version's weights.
SPEAKERS, TAGGERS = (0, 1), (0, 1)


class Wider(Speaker):
    """A speaker whose states have another size."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 10, batch_first=True)
        self.linear = nn.Linear(10, 11)


def export_versions(folder: Path, models: Path) -> None:
    """`speaker` and `tagger` in versions 1, of `models`, and 2, of other weights, and `speaker` 3 with other states."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    torch.manual_seed(5)
    tokens, frames = torch.randint(0, 11, (3, 6)), torch.randn(3, 6, 5)
    cx.export(make(Speaker, SPEAKERS[1]), tokens, name="speaker", out=folder)
    cx.export(make(Wider, 2), tokens, name="speaker", out=folder)
    cx.export(make(Tagger, TAGGERS[1]), frames, name="tagger", out=folder, policy=cx.Lookahead(block=4, ahead=2))


def add_variant(bundle: Path, variant: str) -> None:
    """Have a bundle offer its graphs under the name of another variant as well."""
    manifest = bundle / "manifest.json"
    parsed = json.loads(manifest.read_text())
    parsed["graphs"] += [{**graph, "variant": variant} for graph in parsed["graphs"]]
    manifest.write_text(json.dumps(parsed))


def put(versions: Path, models: Path, *names: str, **under: str) -> None:
    """Put versions such as "speaker/1" into a models folder; `under` may say under which number, `speaker="7"`."""
    for name in names:
        model, _, version = name.partition("/")
        shutil.copytree(versions / name, models / model / under.get(model, version))


def rewrite(bundle: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    """Change one of a bundle's files, and its checksum with it."""
    path, manifest = bundle / file, bundle / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    parsed = json.loads(manifest.read_text())
    (entry,) = [each for each in parsed["files"] if each["path"] == file]
    entry["sha256"] = sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(parsed))


def spoken(x: np.ndarray, *parts: tuple[int, int]) -> np.ndarray:
    """What speakers answer to `x` `[time]`: for each (version, frames) so many frames, the state handed on; eager."""
    state, outputs, at = None, [], 0
    with torch.no_grad():
        for version, frames in parts:
            model = make(Speaker, SPEAKERS[version - 1])
            if frames:
                y, state = model.lstm(model.embedding(torch.from_numpy(x[None, at : at + frames])), state)
                outputs.append(model.linear(y)[0].numpy())
            at += frames
    assert at == len(x)
    return np.concatenate(outputs)


def tagged(x: np.ndarray, blocks: int, *, block: int = 4, ahead: int = 2) -> np.ndarray:
    """What taggers answer to `x` `[time, 5]` under lookahead: `blocks` blocks by version 1 and the rest by version 2.

    Eager, each layer's forward states handed on from block to block, each backward direction from zero.
    """
    models = [make(Tagger, seed) for seed in TAGGERS]
    directions = [[[_single(m.lstm, layer, s) for s in ("", "_reverse")] for layer in range(2)] for m in models]
    states: list[tuple[torch.Tensor, torch.Tensor] | None] = [None, None]
    outputs = []
    with torch.no_grad():
        for number, at in enumerate(range(0, len(x), block)):
            which = int(number >= blocks)
            seen = torch.from_numpy(x[None, at : at + block + ahead])
            size = min(block, len(x) - at)
            for layer, (forward, backward) in enumerate(directions[which]):
                y, end = forward(seen[:, :size], states[layer])
                if seen.shape[1] > size:
                    y = torch.cat([y, forward(seen[:, size:], end)[0]], 1)
                states[layer] = end
                seen = torch.cat([y, backward(seen.flip(1))[0].flip(1)], 2)
            outputs.append(models[which].linear(seen[0, :size]).numpy())
    return np.concatenate(outputs)


def _single(lstm: nn.LSTM, layer: int, suffix: str) -> nn.LSTM:
    """One layer's one direction."""
    single = nn.LSTM(lstm.input_size if layer == 0 else 2 * lstm.hidden_size, lstm.hidden_size, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(single, f"{name}_l0").data = getattr(lstm, f"{name}_l{layer}{suffix}").data
    return single.eval()

"""The main job, end to end on a real model: export, prove, serve, stream from many sessions, compare.

Run from the checkout: python -m examples.pinyin.run [--serve]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from examples.pinyin import model, show, traffic
from examples.pinyin.server import CAROUSEL, ServerError, running
from examples.pinyin.text import Tables, read_sentences
from examples.pinyin.traffic import Probabilities
from numpy.typing import NDArray
from rich.console import Console

import carousel_client as cc
import carousel_client.aio as carousel
import carousel_export as cx
from carousel_protos.bundle import Bundle, BundleError, newest_version

MODELS = Path("models")
NAME = "pinyin"
AT_ONCE = 256
LISTEN = "127.0.0.1:8001"
POLICIES: dict[str, cc.Policy] = {
    "carry(1)": cc.Carry(1),
    "carry, random chunks": cc.Carry(),
    "lookahead(1, 1)": cc.Lookahead(1, 1),
    "lookahead(1, 8)": cc.Lookahead(1, 8),
    "lookahead(8, 8)": cc.Lookahead(8, 8),
    "full": cc.Full(),
}
SHOWN = (
    "重庆的夏天很热，出门要带重重的水壶。",
    "他借了钱还不肯还，真叫人生气。",
    "这里的东西很便宜，交通也很方便。",
    "大家称呼他老师，他觉得很不相称。",
    "曾祖父曾经住在这里。",
)

console = Console(highlight=False)


def main() -> int:
    arguments = argparse.ArgumentParser(description="Pinyin of Chinese text, exported, proved, served and streamed.")
    arguments.add_argument("--serve", action="store_true", help="keep a server up instead, and say how to stream to it")
    # A SIGTERM ends this as Ctrl-C does: half a bundle is removed, the server is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.parse_args().serve:
            serve()
        else:
            compare()
    except (cx.ExportError, BundleError, ServerError, cc.CarouselError) as error:
        console.print(f"[red]failed:[/] {error}", soft_wrap=True)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped")
        return 130
    return 0


def compare() -> None:
    """Export, then stream every sentence under each policy, and compare with the offline answer."""
    torch.set_num_threads(1)  # one sentence at a time gains nothing from more
    tables, sentences, network = Tables(), read_sentences(), model.load()
    bundle = export(network, tables, sentences)
    sequences = [tables.encode(sentence) for sentence in sentences]
    with torch.inference_mode():
        offline = [network(torch.from_numpy(characters)[None])[0].numpy() for characters in sequences]

    console.rule("serve and stream", align="left")
    runs = asyncio.run(stream(sequences))
    places = [np.array(tables.ambiguous(sentence)) + 1 for sentence in sentences]  # after the begin mark
    found = [show.Agreement(name, *agreement(run.answers, offline, places), run) for name, run in runs.items()]
    ambiguous = sum(len(place) for place in places)
    most = max(run.sessions for run in runs.values())
    console.print(
        f"{len(sentences)} sentences with {ambiguous:,} ambiguous characters; each sentence a session, up to {most} "
        f"open at once; chunks of 1 to {traffic.LARGEST_CHUNK} characters\n",
        soft_wrap=True,
    )
    console.print(show.agreement_table(found))
    error = max(float(np.abs(a - b).max()) for a, b in zip(runs["full"].answers, offline, strict=True))
    console.print(f"\nserved under full against eager PyTorch: largest error {error:.1e}\n")

    console.rule("readings as streamed under lookahead(8, 8)", align="left")
    for sentence in SHOWN:
        answer = runs["lookahead(8, 8)"].answers[sentences.index(sentence)]
        for line in show.readings(console, tables, sentence, tables.read(sentence, answer.argmax(-1))):
            console.print(line)
    console.print(f"bundle  {bundle.path}\nreport  {bundle.path / 'report.html'}", soft_wrap=True)


async def stream(sequences: Sequence[NDArray[np.int64]]) -> dict[str, traffic.Run]:
    """Start the server, stream everything to it under each policy, and stop it."""
    task = asyncio.current_task()
    assert task is not None, "asyncio.run made one"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with running(MODELS, NAME) as target, carousel.connect(target) as client:
        console.print(f"server at {target}; it replayed the bundle's golden vectors first")
        return {
            name: await traffic.stream_all(client, NAME, sequences, policy, AT_ONCE)
            for name, policy in POLICIES.items()
        }


def export(network: model.Pinyin, tables: Tables, sentences: Sequence[str]) -> Bundle:
    """A new version of the bundle, its parity printed. Older ones stay: a server may be running them."""
    console.rule("export and prove", align="left")
    sample = random.Random(0).sample(list(sentences), 48)
    data = [torch.from_numpy(tables.encode(sentence)) for sentence in sample]
    with console.status("exporting"):
        bundle = cx.export(
            network,
            torch.stack([characters[:7] for characters in data[:2]]),
            name=NAME,
            out=MODELS,
            policy=cx.Lookahead(block=8, ahead=8),
            labels=tables.readings,
            metadata={"weights": "g2pM 0.1.2.5, Apache-2.0"},
            input_names=["characters"],
            output_names=["readings"],
            data=data,
        )
    parity = json.loads(bundle.file("parity.json").read_text(encoding="utf-8"))
    console.print(show.parity_table(parity))
    console.print(
        f"\nlargest error against eager PyTorch {parity['maximum']:.1e}, allowed {parity['tolerance']:.0e}; "
        f"{len(parity['checks'])} checks in {parity['seconds']:.1f} s\n"
    )
    return bundle


def agreement(
    answers: Sequence[Probabilities], offline: Sequence[Probabilities], places: Sequence[NDArray[np.int64]]
) -> tuple[int, int]:
    """How many of the ambiguous characters were read as offline, and how many there are."""
    same = [
        answer.argmax(-1)[place] == whole.argmax(-1)[place]
        for answer, whole, place in zip(answers, offline, places, strict=True)
    ]
    return int(sum(row.sum() for row in same)), sum(len(row) for row in same)


def serve() -> None:
    """Become `carousel serve` on the example's bundle, which is exported first where there is none."""
    try:
        bundle = Bundle.open(newest_version(MODELS / NAME))
    except BundleError:
        bundle = export(model.load(), Tables(), read_sentences())
    python = Path(os.path.relpath(sys.executable))
    console.print(f"serving {bundle.path}; Ctrl-C ends it. In another terminal:\n")
    console.print(
        f"  {python} -m examples.pinyin.text 银行的行长 | {python.with_name('carousel')} stream {NAME} - --labels\n",
        soft_wrap=True,
    )
    os.execv(CAROUSEL, [str(CAROUSEL), "serve", "--models", str(MODELS), "--listen", LISTEN])  # noqa: S606 -- our own


if __name__ == "__main__":
    sys.exit(main())

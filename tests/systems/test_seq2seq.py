"""Sequence to sequence: a bidirectional encoder and an attention decoder, exported as two linked models."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from tests.client.process import serving
from tests.support.models import make
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx
from carousel_protos.v1.carousel_pb2 import GetModelResponse

SOURCE_WORDS, WORDS, HIDDEN, START, STEPS = 13, 11, 8, 0, 12


class Encoder(nn.Module):
    """Source tokens `[batch, time]` → the memory `[batch, time, 2 × hidden]`, and the decoder's first state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SOURCE_WORDS, 6)
        self.rnn = nn.GRU(6, HIDDEN, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        memory, h = self.rnn(self.embedding(tokens))
        return {"memory": memory, "hidden": self.bridge(torch.cat([h[0], h[1]], dim=-1)).tanh()[None]}


class Decoder(nn.Module):
    """Target tokens `[batch, time]`, the state and the memory → logits, the state, and what was attended.

    Luong et al. 2015: the layer's output asks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.rnn = nn.GRU(6, HIDDEN, batch_first=True)
        self.key = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.out = nn.Linear(3 * HIDDEN, WORDS)

    def forward(self, tokens: Tensor, hidden: Tensor, memory: Tensor) -> dict[str, Tensor]:
        y, hidden = self.rnn(self.embedding(tokens), hidden)
        weights = (y @ self.key(memory).mT).softmax(-1)
        logits = self.out(torch.cat([y, weights @ memory], dim=-1))
        return {"logits": logits, "hidden": hidden, "attention": weights}


class Bahdanau(nn.Module):
    """The state before a step asks (Bahdanau et al. 2015), as the PyTorch tutorial has it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(2 * HIDDEN, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(torch.tanh(self.query(query) + self.key(keys))).squeeze(2).unsqueeze(1)
        weights = scores.softmax(-1)
        return torch.bmm(weights, keys), weights


class StepDecoder(nn.Module):
    """One target token `[batch, 1]`, the state and the encoder's outputs → logits, the state, and what was attended."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.attention = Bahdanau()
        self.gru = nn.GRU(6 + 2 * HIDDEN, HIDDEN, batch_first=True)
        self.out = nn.Linear(HIDDEN, WORDS)

    def forward(self, token: Tensor, hidden: Tensor, encoder_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, weights = self.attention(hidden.permute(1, 0, 2), encoder_outputs)
        output, hidden = self.gru(torch.cat([self.embedding(token), context], dim=2), hidden)
        return self.out(output), hidden, weights


LINKS = {"memory": ("encoder", "memory"), "rnn.h_0": ("encoder", "hidden")}
STEP_LINKS = {"encoder_outputs": ("encoder", "memory"), "gru.h_0": ("encoder", "hidden")}


@torch.no_grad()
def eager_greedy(source: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """Tokens, logits and attention of a greedy decode, step by step in eager PyTorch."""
    encoder, decoder = make(Encoder), make(Decoder)
    start = encoder(source[None])
    state, token = start["hidden"], START
    tokens, logits, attention = [], [], []
    for _ in range(STEPS):
        step = decoder(torch.tensor([[token]]), state, start["memory"])
        state, token = step["hidden"], int(step["logits"].argmax())
        tokens.append(token)
        logits.append(step["logits"][0])
        attention.append(step["attention"][0])
    return tokens, torch.cat(logits), torch.cat(attention)


@torch.no_grad()
def eager_steps(source: Tensor, forced: list[int] | None = None) -> tuple[list[int], Tensor, Tensor]:
    """Tokens, logits and attention of the tutorial's loop: greedy, or over the tokens that it is given."""
    encoder, decoder = make(Encoder), make(StepDecoder)
    start = encoder(source[None])
    state, known, logits, attention = start["hidden"], [START], [], []
    for i in range(STEPS if forced is None else len(forced)):
        token = known[-1] if forced is None else forced[i]
        said, state, weights = decoder(torch.tensor([[token]]), state, start["memory"])
        known.append(int(said.argmax()))
        logits.append(said[0])
        attention.append(weights[0])
    return known[1:], torch.cat(logits), torch.cat(attention)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    torch.manual_seed(1)
    cx.export(make(Encoder), torch.randint(0, SOURCE_WORDS, (3, 6)), name="encoder", out=folder)
    cx.export(make(Decoder), decoder_example(), name="decoder", out=folder, links=LINKS)
    step = torch.randint(0, WORDS, (3, 1)), torch.zeros(1, 3, HIDDEN), torch.randn(3, 6, 2 * HIDDEN)
    names = ["logits", "attention"]
    cx.export(make(StepDecoder), step, name="step", out=folder, links=STEP_LINKS, output_names=names)
    return folder


def decoder_example() -> tuple[Tensor, ...]:
    return torch.randint(0, WORDS, (3, 5)), torch.zeros(1, 3, HIDDEN), torch.randn(3, 6, 2 * HIDDEN)


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[cc.Client]:
    with serving(models) as server, cc.connect(server.address) as connected:
        yield connected


def open_decoder(client: cc.Client, source: Tensor, name: str = "decoder") -> cc.Session:
    """A decoder session that starts from what its manifest's links say the encoder answers."""
    described: GetModelResponse = client.model(name)
    states = {state.input for state in described.manifest.states}
    given: dict[str, np.ndarray] = {}
    for link in described.manifest.links:
        answer = client.infer(link.model, source[None].numpy())[link.output]
        given[link.input] = answer[:, 0] if link.input in states else answer[0]
    initial = {name: value for name, value in given.items() if name in states}
    context = {name: value for name, value in given.items() if name not in states}
    return client.session(name, initial_state=initial, context=context)


@pytest.mark.system("12", "bidirectional GRU encoder and attention decoder, linked: greedy decode of several sources")
def test_greedy_decode_equals_eager(client: cc.Client) -> None:
    """Greedy decodes of sources of several lengths, interleaved on one server, say what eager PyTorch says."""
    generator = torch.Generator().manual_seed(3)
    sources = [torch.randint(0, SOURCE_WORDS, (length,), generator=generator) for length in (9, 1, 4, 9)]
    sessions = [open_decoder(client, source) for source in sources]
    answers: list[list[dict[str, np.ndarray]]] = [[] for _ in sources]
    for session in sessions:
        session.__enter__()
    tokens = [[START] for _ in sources]
    for _ in range(STEPS):
        for session, known, said in zip(sessions, tokens, answers, strict=True):
            answer = session.send([known[-1]])
            said.append(answer)
            known.append(int(answer["logits"][0].argmax()))
    for session in sessions:
        session.__exit__(None, None, None)
    for source, known, said in zip(sources, tokens, answers, strict=True):
        wanted_tokens, logits, attention = eager_greedy(source)
        assert known[1:] == wanted_tokens
        for name, wanted in (("logits", logits), ("attention", attention)):
            got = np.concatenate([answer[name] for answer in said])
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.system(
    "12", "the tutorial's decoder, one token a call, attention that asks with the state before the step"
)
def test_greedy_decode_of_a_step_model(client: cc.Client) -> None:
    """Greedy decodes with a decoder of one token a call, interleaved on one server, are the eager loop's."""
    generator = torch.Generator().manual_seed(4)
    sources = [torch.randint(0, SOURCE_WORDS, (length,), generator=generator) for length in (9, 1, 4, 9)]
    sessions = [open_decoder(client, source, "step") for source in sources]
    answers: list[list[dict[str, np.ndarray]]] = [[] for _ in sources]
    tokens = [[START] for _ in sources]
    with contextlib.ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session)
        for _ in range(STEPS):
            for session, known, said in zip(sessions, tokens, answers, strict=True):
                said.append(session.send([known[-1]]))
                known.append(int(said[-1]["logits"][0].argmax()))
    for source, known, said in zip(sources, tokens, answers, strict=True):
        wanted_tokens, logits, attention = eager_steps(source)
        assert known[1:] == wanted_tokens
        for name, wanted in (("logits", logits), ("attention", attention)):
            got = np.concatenate([answer[name] for answer in said])
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_chunks_of_a_step_model(client: cc.Client) -> None:
    """Several tokens in one chunk, as in teacher forcing, are answered as the eager loop answers them one by one."""
    source = torch.randint(0, SOURCE_WORDS, (5,), generator=torch.Generator().manual_seed(5))
    forced = [START, 3, 7, 1, 1, 9, 10, 2]
    with open_decoder(client, source, "step") as session:
        said = [session.send(forced[start:end]) for start, end in ((0, 5), (5, 6), (6, 8))]
    _, logits, attention = eager_steps(source, forced)
    for name, wanted in (("logits", logits), ("attention", attention)):
        np.testing.assert_allclose(np.concatenate([each[name] for each in said]), wanted, rtol=0, atol=1e-5)


def test_ragged_rows_of_a_step_model(client: cc.Client, models: Path) -> None:
    """Rows of different length in one step each stop at their own end: answers and states are the loop's."""
    lengths, decoder = (7, 2, 4), make(StepDecoder)
    tokens, memory, hidden = torch.randint(0, WORDS, (3, 7)), torch.randn(3, 5, 2 * HIDDEN), torch.rand(3, 1, HIDDEN)
    (file,) = (models / "step").glob("*/model.onnx")
    feeds = {"token": tokens, "lengths": torch.tensor(lengths).int(), "encoder_outputs": memory, "gru.h_0": hidden}
    values = {name: value.numpy() for name, value in feeds.items()}
    logits, _, ended = InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, values)
    served = client.infer(
        "step", {"token": values["token"], "encoder_outputs": values["encoder_outputs"]}, lengths=lengths
    )
    with torch.no_grad():
        for row, length in enumerate(lengths):
            for start, got in ((hidden[row][:, None], logits), (torch.zeros(1, 1, HIDDEN), served["logits"])):
                state, wanted = start, []
                for i in range(length):
                    said, state, _ = decoder(tokens[row : row + 1, i : i + 1], state, memory[row : row + 1])
                    wanted.append(said[0])
                np.testing.assert_allclose(got[row, :length], torch.cat(wanted), rtol=0, atol=1e-5)
                if got is logits:
                    np.testing.assert_allclose(ended[row], state[:, 0], rtol=0, atol=1e-5)


def test_teacher_forcing_in_a_batch(client: cc.Client) -> None:
    """A ragged batch of target sequences with their memories is answered as eager PyTorch answers each alone."""
    tokens, memory = torch.randint(0, WORDS, (3, 7)), torch.randn(3, 5, 2 * HIDDEN)
    got = client.infer("decoder", {"tokens": tokens.numpy(), "memory": memory.numpy()}, lengths=[7, 2, 4])
    with torch.no_grad():
        for row, length in enumerate((7, 2, 4)):
            zero = torch.zeros(1, 1, HIDDEN)
            wanted = make(Decoder)(tokens[row : row + 1, :length], zero, memory[row : row + 1])
            for name in ("logits", "attention"):
                value = wanted[name]
                np.testing.assert_allclose(got[name][row, :length], value[0], rtol=0, atol=1e-5)
                assert not got[name][row, length:].any()


async def test_the_asyncio_client(models: Path, client: cc.Client) -> None:
    """A context is given to a session of the asyncio client as to the blocking one's."""
    memory = torch.randn(5, 2 * HIDDEN)
    async with (
        cc.aio.connect(client.target) as connected,
        connected.session("decoder", context={"memory": memory.numpy()}) as session,
    ):
        got = await session.send([1, 2, 3], end=True)
    with torch.no_grad():
        wanted = make(Decoder)(torch.tensor([[1, 2, 3]]), torch.zeros(1, 1, HIDDEN), memory[None])["logits"][0]
    np.testing.assert_allclose(got["logits"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({}, ["memory"]),
        ({"memory": np.zeros((3, 5), np.float32)}, ["memory", "[source, 16]", "[3, 5]"]),
        ({"memory": np.zeros((3, 16))}, ["memory", "float64"]),
        ({"memory": np.zeros((0, 16), np.float32)}, ["memory", "[0, 16]"]),
        ({"memory": np.full((3, 16), np.nan, np.float32)}, ["memory", "finite"]),
        ({"memory": np.zeros((3, 16), np.float32), "more": 1}, ["more"]),
    ],
)
def test_a_context_that_does_not_fit(client: cc.Client, context: dict[str, object], words: list[str]) -> None:
    """A context that lacks, or has another type, shape or values, is refused with what was wanted."""
    with pytest.raises(cc.InvalidArgument) as refused, client.session("decoder", context=context) as session:
        session.ready()
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("rows", "words"), [(2, ["[2, 5, 16]", "3 rows"]), (3, ["float64"])])
def test_contexts_of_a_batch_that_do_not_fit(client: cc.Client, rows: int, words: list[str]) -> None:
    """A batch of whole sequences needs a context for each row, of the right kind."""
    kind = np.float32 if rows == 2 else np.float64
    batch = {"tokens": np.zeros((3, 4), np.int64), "memory": np.zeros((rows, 5, 16), kind)}
    with pytest.raises(cc.InvalidArgument) as refused:
        client.infer("decoder", batch)
    for word in words:
        assert word in str(refused.value)


def test_contexts_are_bounded(models: Path) -> None:
    """Sessions may hold so many bytes of context together, and no more; closing one makes room."""
    context = {"memory": np.zeros((4, 16), np.float32)}
    with serving(models, max_context_bytes=2 * 256) as server, cc.connect(server.address) as client:
        with client.session("decoder", context=context) as one, client.session("decoder", context=context) as two:
            one.ready()
            two.ready()
            with (
                pytest.raises(cc.ResourceExhausted, match="512 are allowed"),
                client.session("decoder", context=context) as three,
            ):
                three.ready()
        with client.session("decoder", context=context) as four:
            four.ready()


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ({"hidden": ("encoder", "hidden")}, ["hidden", "memory", "rnn.h_0"]),
        ({"memory": ("encoder", "nothing")}, ["encoder", "nothing", "hidden"]),
        ({"memory": ("nobody", "memory")}, ["nobody", "export it first"]),
        ({"rnn.h_0": ("encoder", "memory")}, ["rnn.h_0", "[1, 8]", "[time, 16]"]),
    ],
)
def test_links_that_do_not_fit(models: Path, links: dict[str, tuple[str, str]], words: list[str]) -> None:
    """A link to what is not there, or has another shape, is refused by its name."""
    with pytest.raises(cx.ExportError) as refused:
        cx.export(make(Decoder), decoder_example(), name="other", out=models, links=links)
    for word in words:
        assert word in str(refused.value)
    assert not (models / "other").exists()

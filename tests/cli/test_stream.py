"""`carousel stream` against a real server."""

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.conftest import LABELS, Run, one_line, usage
from tests.client.conftest import Mixer
from tests.client.process import CAROUSEL, serving
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def words(tokens: list[int]) -> list[str]:
    return [LABELS[best] for best in whole(make(Speaker), torch.tensor(tokens)).argmax(-1)]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_file_is_streamed_and_its_answers_written(run: Run, tmp_path: Path, address: str):
    """The written answers are the eager ones under the policy asked for; a summary says what was done."""
    x = torch.randn(50, 5)
    np.save(tmp_path / "x.npy", x.numpy())
    asked = ("stream", "tagger", "x.npy", "--target", address, "--chunk", 7, "--output", "y.npy")
    done = run(*asked)
    assert done.returncode == 0, done
    assert "tagger/1 lookahead(4, 2): 50 frames in 8 chunks" in done.stderr
    assert "output float32 [50, 3]" in done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), looked_ahead(make(Tagger), x, 4, 2), rtol=0, atol=1e-5)
    done = run(*asked, "--policy", "carry", "--block", 9)
    assert "tagger/1 carry(9)" in done.stderr
    wanted = carried(make(Tagger), x, [9] * 5 + [5])
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=0, atol=1e-5)


def test_several_inputs_and_outputs(run: Run, tmp_path: Path, address: str):
    """An .npz file carries an array for each input, and takes one for each output."""
    x, ids = torch.randn(12, 4), torch.randint(0, 6, (12,))
    np.savez(tmp_path / "in.npz", x=x.numpy(), ids=ids.numpy())
    done = run("stream", "mixer", "in.npz", "--target", address, "--chunk", 5, "--output", "out.npz")
    assert done.returncode == 0, done
    with torch.no_grad():
        frames, summary = make(Mixer)(x[:, None], ids[:, None])
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_allclose(got["frames"], frames[:, 0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(got["summary"], summary[0], rtol=0, atol=1e-5)
    assert "several outputs" in usage(run("stream", "mixer", "in.npz", "--target", address, "--output", "out.npy"))
    np.save(tmp_path / "x.npy", x.numpy())
    assert "several inputs" in one_line(run("stream", "mixer", "x.npy", "--target", address))


@pytest.mark.parametrize("chunk", [2, 64])
def test_standard_input_may_be_an_npy_file(run: Run, address: str, chunk: int):
    """An .npy file on standard input is streamed, and its labels printed, a line for each frame."""
    asked = ("stream", "talker", "-", "--target", address, "--labels", "--chunk", chunk)
    done = run(*asked, input=npy(np.array(TOKENS)), text=False)
    assert done.returncode == 0, done
    assert done.stdout.decode().split() == words(TOKENS)
    assert b"talker/1 causal: 9 frames in %d chunks" % -(-9 // chunk) in done.stderr
    done = run(*asked, input=npy(np.array(TOKENS))[:-20], text=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"ended after 6 of 9 frames" in done.stderr


def test_lines_are_answered_as_they_arrive(address: str):
    """A frame on a live pipe is answered before the next one is written."""
    command = [CAROUSEL, "stream", "talker", "-", "--target", address, "--labels"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        for token, word in zip(TOKENS, words(TOKENS), strict=True):
            process.stdin.write(f"{token}\n")
            assert process.stdout.readline() == f"{word}\n"
        process.stdin.close()
        assert process.wait(20) == 0
        assert "9 frames in 9 chunks" in process.stderr.read()


def test_a_live_pipe_whose_server_goes_ends_with_a_line(cli_models: Path):
    """With the server gone for too long the command ends, though standard input stays open and silent."""
    with serving(cli_models) as server:
        command = [CAROUSEL, "stream", "talker", "-", "--target", server.address, "--labels", "--resume-timeout", "0.2"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
            process.stdin.write("3\n")
            assert process.stdout.readline() == f"{words([3])[0]}\n"
            server.stop()
            assert process.wait(20) == 1
            message = process.stderr.read()
            assert message.startswith("Error: ")
            assert message.count("\n") == 1


def test_what_cannot_be_streamed_is_said_in_a_line(run: Run, tmp_path: Path, address: str):
    """Wrong models, files, shapes and lines each fail with one line."""
    to = ("--target", address)
    np.save(tmp_path / "x.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((3, 5)))
    (tmp_path / "text.npy").write_text("no array")
    assert "no model 'nobody'" in one_line(run("stream", "nobody", "x.npy", *to))
    assert "float32 [3, 4]; wanted float32 [frames, 5]" in one_line(run("stream", "tagger", "x.npy", *to))
    message = one_line(run("stream", "tagger", "wide.npy", *to))
    assert "float64 [3, 5]; wanted float32 [frames, 5]; convert it with .astype(numpy.float32)" in message
    assert "text.npy cannot be read" in one_line(run("stream", "tagger", "text.npy", *to))
    assert "none.npy cannot be read" in one_line(run("stream", "tagger", "none.npy", *to))
    done = run("stream", "tagger", "-", *to, input="1 2 3 4 5\n\n1,2,3,4,x\n")
    assert "line 3 of standard input is not 5 numbers of float32: could not convert string to float: 'x'" in one_line(
        done
    )
    done = run("stream", "tagger", "-", *to, input="1 2 3\n")
    assert "line 1 of standard input is not 5 numbers of float32, it has 3; write a frame on each line" in one_line(
        done
    )
    assert "does not allow policy causal" in one_line(run("stream", "tagger", "x.npy", *to, "--policy", "causal"))
    assert "no labels" in usage(run("stream", "tagger", "x.npy", *to, "--labels"))
    assert "--block goes with" in usage(run("stream", "tagger", "x.npy", *to, "--block", 3))
    assert "needs --block and --ahead" in usage(run("stream", "tagger", "x.npy", *to, "--policy", "lookahead"))


def test_files_that_hold_no_arrays(run: Run, tmp_path: Path, address: str):
    """A checkpoint, which is a zip file too, and pickled objects are refused with a line that says what to save."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "tagger.pt")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name, why in (("tagger.pt", "is a zip file, and no .npz"), ("objects.npy", "holds pickled objects")):
        message = one_line(run("stream", "tagger", name, "--target", address))
        assert f"{name} " in message
        assert why in message
        assert "numpy.save" in message


def test_no_frames_are_refused_wherever_they_come_from(run: Run, tmp_path: Path, address: str):
    """An empty pipe, blank lines and empty arrays fail with the same line, and nothing is written."""
    empty = np.zeros((0,), np.int64)
    np.save(tmp_path / "none.npy", empty)
    np.savez(tmp_path / "none.npz", tokens=empty)
    to = ("--target", address, "--output", "y.npy")
    for name in ("none.npy", "none.npz"):
        assert f"{name} has no frames; give at least one" in one_line(run("stream", "talker", name, *to))
    for given in (b"", b"\n\n", npy(empty)):
        done = run("stream", "talker", "-", *to, input=given, text=False)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == b"Error: standard input has no frames; give at least one\n"
    assert not (tmp_path / "y.npy").exists()


def test_an_output_that_cannot_be_written_is_found_out_first(run: Run, tmp_path: Path, address: str):
    """The file for the answers is tried before anything is streamed; what is there stays until there are answers."""
    np.save(tmp_path / "x.npy", np.zeros((3, 4), np.float32))
    (tmp_path / "y.npy").write_text("older")
    asked = ("stream", "tagger", "x.npy", "--target", address, "--output")
    message = one_line(run(*asked, "nowhere/a.npy"))
    assert "nowhere/a.npy cannot be written (No such file or directory); give --output a file in a folder" in message
    assert "wanted float32 [frames, 5]" in one_line(run(*asked, "y.npy"))
    assert (tmp_path / "y.npy").read_text() == "older"
    assert "wanted float32 [frames, 5]" in one_line(run(*asked, "new.npy"))
    assert not (tmp_path / "new.npy").exists()

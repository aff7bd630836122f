"""`carousel sessions` against a real server."""

import json
from pathlib import Path

import numpy as np
import torch
from tests.cli.conftest import Run, one_line, usage
from tests.support.models import Speaker, make, whole

import carousel_client as cc

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])


def test_a_session_is_listed_carried_in_a_file_and_dropped(run_here: Run, tmp_path: Path, address: str):
    """A session's place is shown, written to a private file, gone on from under another id, and the session ended."""
    target = ("--target", address)
    with cc.connect(address) as client:
        with client.session("speaker", session_id="shown") as session:
            session.send(TOKENS[:4])
            listed = json.loads(run_here("sessions", "list", "--model", "speaker", "--json", *target).stdout)
            (shown,) = [entry for entry in listed if entry["session_id"] == "shown"]
            assert shown.pop("idle_s") < 60
            assert shown == {
                "session_id": "shown",
                "model": "speaker",
                "version": "1",
                "variant": "float32",
                "policy": "causal",
                "epoch": 1,
                "next_index": 1,
                "attached": True,
            }
            table = run_here("sessions", "list", *target).stdout
            assert [word for word in ("shown", "speaker/1", "causal", "attached") if word not in table] == []
            done = run_here("sessions", "export", "shown", "state.bin", *target)
            size = (tmp_path / "state.bin").stat().st_size
            assert done.stdout == f"wrote {size} bytes to state.bin\n"
            assert (tmp_path / "state.bin").stat().st_mode & 0o077 == 0
        done = run_here("sessions", "import", "state.bin", "--id", "again", *target)
        assert done.stdout == "session again of speaker/1 under causal expects chunk 1\n"
        with client.session("speaker", session_id="again", resume=True) as session:
            got = session.send(TOKENS[4:])
            wanted = whole(make(Speaker), torch.from_numpy(TOKENS))[4:].numpy()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
        run_here("sessions", "import", "state.bin", "--id", "dropped", *target)
        assert run_here("sessions", "drop", "dropped", *target).stdout == "session dropped is closed\n"
        assert "dropped" not in run_here("sessions", "list", "--json", *target).stdout


def test_what_cannot_be_done_is_one_line(run: Run, tmp_path: Path, address: str):
    """A session that is not there, a file that is no state, one that cannot be written: each is one clear line."""
    target = ("--target", address)
    (tmp_path / "junk").write_bytes(b"junk")
    assert "there is no session 'nobody'" in one_line(run("sessions", "export", "nobody", "x", *target))
    assert not (tmp_path / "x").exists()
    assert "there is no session 'nobody'" in one_line(run("sessions", "drop", "nobody", *target))
    assert "is no carousel.v1.PortableState" in one_line(run("sessions", "import", "junk", *target))
    assert "nobody listens there" in one_line(run("sessions", "list", "--target", "127.0.0.1:1"))
    assert "does not exist" in usage(run("sessions", "import", "nowhere", *target))


def test_the_file_and_the_environment_say_where_the_server_is(run_here: Run, tmp_path: Path, address: str):
    """A subcommand's flags can stand in the group's table of the config file, and in the environment."""
    (tmp_path / "carousel.toml").write_text(f'[sessions]\ntarget = "{address}"\n')
    assert run_here("--config", "carousel.toml", "sessions", "list", "--json").stdout.startswith("[")
    assert run_here("sessions", "list", "--json", env={"CAROUSEL_TARGET": address}).stdout.startswith("[")
    (tmp_path / "carousel.toml").write_text('[sessions]\ntarger = "x"\n')
    done = run_here("--config", "carousel.toml", "sessions", "list")
    assert "unknown key targer in [sessions]; did you mean target?" in done.stderr

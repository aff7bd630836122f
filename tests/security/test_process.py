"""The `carousel` command with certificates and tokens, as processes; and what their logs and help tell."""

import json
import re
from pathlib import Path

import numpy as np
from tests.cli.conftest import Run, one_line, usage
from tests.client.process import ServerProcess
from tests.security.conftest import TokenFile
from tests.support.certificates import Authority, Pair

import carousel_client as cc

FRAMES = np.ones((9, 5), np.float32)


def test_a_token_made_by_the_command_opens_a_server_with_tls(
    run: Run, models: Path, tmp_path: Path, authority: Authority, server_pair: Pair
):
    """`carousel token`, `serve` and `stream` fit together; neither the server's log nor any output has a token in it,
    after right calls and wrong ones.
    """
    made = run("token", "anna")
    assert made.returncode == 0
    token = made.stdout.strip()
    assert re.fullmatch(r"carousel_[A-Za-z0-9_-]{43}", token)
    assert token not in made.stderr
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(made.stderr)
    np.save(tmp_path / "x.npy", FRAMES)
    wrong = run("token", "eve").stdout.strip()
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key, "tokens": tokens, "log_level": "debug"}
    server = ServerProcess(models, **settings)
    said = ""
    try:
        assert server._listening.wait(30), server.log
        ask = ("stream", "tagger", "x.npy", "--target", server.address)
        secured = (*ask, "--tls-ca", authority.path)
        with cc.connect(server.address, tls=cc.TLS(root_certificates=authority.path), token=token) as client:
            _wait_until_served(client)
        done = run(*secured, "--output", "y.npy", env={"CAROUSEL_TOKEN": token})
        assert done.returncode == 0, done
        assert np.load(tmp_path / "y.npy").shape == (9, 3)
        by_flag = run(*secured, "--token", token)
        assert by_flag.returncode == 0
        refused = run(*secured, env={"CAROUSEL_TOKEN": wrong})
        assert "the token is not one that this server knows" in one_line(refused)
        without = run(*secured)
        assert "a token is needed" in one_line(without)
        plain = run(*ask, env={"CAROUSEL_TOKEN": token})
        assert "it may want TLS" in one_line(plain)
        (tmp_path / "carousel.toml").write_text(
            f"[stream]\ntls-ca = {json.dumps(str(authority.path))}\ntoken = {json.dumps(token)}\n"
        )
        from_file = run("--config", "carousel.toml", *ask)
        assert from_file.returncode == 0
        outputs = (done, by_flag, refused, without, plain, from_file)
        said = "".join(output.stdout + output.stderr for output in outputs)
    finally:
        server.stop()
    said += "".join(server.log)
    assert re.search(r"refused \d+ calls without a known token, the last from", said), server.log
    for secret in (token, wrong, token.removeprefix("carousel_"), wrong.removeprefix("carousel_")):
        assert secret not in said


def _wait_until_served(client: cc.Client) -> None:
    import time

    deadline = time.monotonic() + 30
    while True:
        try:
            client.model("tagger").manifest.ListFields()
            with client.session("tagger") as session:
                session.ready()
        except (cc.Unavailable, cc.FailedPrecondition, cc.NotFound):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def test_a_token_is_in_no_help_and_no_message(run: Run, tmp_path: Path):
    """`--help` shows no token that the environment or the config file has, and no usage error repeats one."""
    secret = "carousel_" + "s" * 43
    (tmp_path / "carousel.toml").write_text(f'[stream]\ntoken = "{secret}"\n')
    (tmp_path / "wrong.toml").write_text(f'[stream]\ntoken = ["{secret}"]\n')
    for done in (
        run("stream", "--help", env={"CAROUSEL_TOKEN": secret}),
        run("--config", "carousel.toml", "stream", "--help"),
        run("--config", "wrong.toml", "stream", "m", "x.npy"),
        run("stream", "m", "x.npy", "--target", "10.0.0.1:1", env={"CAROUSEL_TOKEN": secret}),
        run("stream", "m", "x.npy", env={"CAROUSEL_TOKEN": secret + " "}),
    ):
        assert secret not in done.stdout + done.stderr
    assert "CAROUSEL_TOKEN" in run("stream", "--help").stdout


def test_what_cannot_work_is_one_line(run: Run, models: Path, tmp_path: Path, server_pair: Pair, token_file: TokenFile):
    """Settings, files and addresses that cannot be used end the command with one line and the right exit code."""
    serve = ("serve", "--models", models, "--listen")
    assert "--insecure" in usage(run(*serve, "0.0.0.0:0"))
    assert "go together" in usage(run(*serve, "127.0.0.1:0", "--tls-cert", server_pair.certificate))
    missing = ("--tls-cert", server_pair.certificate, "--tls-key", "missing.key")
    assert "missing.key" in one_line(run(*serve, "127.0.0.1:0", *missing))
    (tmp_path / "broken.toml").write_text("anna\n")
    assert "broken.toml is not TOML" in one_line(run(*serve, "127.0.0.1:0", "--tokens", "broken.toml"))
    stream = ("stream", "m", "x.npy", "--target", "127.0.0.1:1")
    assert "missing.pem cannot be read" in one_line(run(*stream, "--tls-ca", "missing.pem"))
    (tmp_path / "empty.pem").write_text("")
    assert "empty.pem is not in PEM" in one_line(run(*stream, "--tls-ca", "empty.pem"))
    assert "go together" in one_line(run(*stream, "--tls-cert", server_pair.certificate))
    remote = ("stream", "m", "x.npy", "--target", "10.0.0.1:1", "--token", "t")
    assert "would travel unencrypted" in one_line(run(*remote))
    assert "Invalid value for '--scope'" in usage(run("token", "anna", "--scope", "root"))
    assert "printable characters" in usage(run("token", ""))

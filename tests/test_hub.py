"""The road to a model hub: with a local stand-in that serves one, and without any."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from meshloom.cli.__main__ import _run
from meshloom.errors import OfflineError
from meshloom.model.config import load_config, load_tokenizer
from meshloom.model.hub import hub_answers
from meshloom.model.pretrained import find_weights

CONFIG = b'{"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 64}'


class _Hub(BaseHTTPRequestHandler):
    """Serves config.json of `someone/small`, as a hub does."""

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        found = self.path == "/someone/small/resolve/main/config.json"
        self.send_response(200 if found else 404)
        body = CONFIG if found else b""
        if found:
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _synth(tmp_path: Path, endpoint: str, model: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "meshloom.cli", "synth", "--model", model, "--plan", "tp2", "--seq-length", "8",
               "--out", str(tmp_path / "out")]  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_model_from_the_hub(tmp_path: Path, hub: str) -> None:
    result = _synth(tmp_path, hub, "someone/small")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.et"))) == 2
    # a second time from the cache, with the hub away
    again = _synth(tmp_path / "again", "http://127.0.0.1:9", "someone/small")
    assert again.returncode == 2
    (tmp_path / "out").rename(tmp_path / "first")
    cached = _synth(tmp_path, "http://127.0.0.1:9", "someone/small")
    assert cached.returncode == 0, cached.stderr


def test_a_name_that_the_hub_does_not_know(tmp_path: Path, hub: str) -> None:
    result = _synth(tmp_path, hub, "someone/else")
    assert result.returncode == 2
    assert "model 'someone/else': expected a preset (" in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_network(tmp_path: Path) -> None:
    result = _synth(tmp_path, "http://127.0.0.1:9", "someone/small")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "the hub cannot be reached" in result.stderr


class _Gateway(BaseHTTPRequestHandler):
    """Says for a hub that it is not there, as proxies do; it counts how often it was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests that came to a gateway without a hub behind it, which is the endpoint meanwhile."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Gateway", (_Gateway,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("load", [load_config, load_tokenizer, find_weights])
def test_a_gateway_without_a_hub_is_asked_once(asked: list[str], load: Callable[[str], object]) -> None:
    """The hub's own client would ask six times, 23 seconds long."""
    with pytest.raises(OfflineError, match="the hub cannot be reached") as told:
        load("someone/nowhere")
    assert "\n" not in str(told.value)
    assert len(asked) == 1


@pytest.mark.parametrize("more", [(), ("--tokenizer", "bytes", "--data", "sample", "--dry-run")])
def test_training_offline_is_one_line(
    asked: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert _run(["train", "--model", "someone/nowhere", "--out", str(tmp_path / "run"), *more]) == 2
    told = capsys.readouterr().err
    assert "the hub cannot be reached" in told
    assert told.count("\n") == 1
    assert len(asked) == 1
    assert not (tmp_path / "run").exists()


def test_a_hub_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection and says nothing
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub_answers(patience_s=0.1)


def test_a_hub_that_answers(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    assert hub_answers()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_answers()

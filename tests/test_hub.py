"""The road to a model hub: with a local stand-in that serves one, and without any."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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

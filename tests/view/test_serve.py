"""The server: lists, reports, curves; nothing outside its folder, nothing written, only for this machine."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshloom.errors import FolderError
from meshloom.view.serve import find_run, make_server
from tests.view.browser import browser
from tests.view.scenes import run_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    run_folder(runs / "one & <two>")
    run_folder(runs / "three")
    (runs / "no-run").mkdir()
    run_folder(tmp_path / "secret")
    (runs / "link").symlink_to(tmp_path / "secret")
    return runs


@pytest.fixture
def port(root: Path) -> Iterator[int]:
    server = make_server(root, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    server.server_close()


def ask(port: int, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    told = answer.status, answer.read().decode()
    connection.close()
    return told


def test_it_lists_and_shows(root: Path, port: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    runs = json.loads(ask(port, "/api/runs")[1])
    assert [run["name"] for run in runs] == ["one & <two>", "three"]
    assert runs[1]["loss"] == 2.5
    assert runs[1]["num_steps"] == 6
    status, page = ask(port, "/run/one%20%26%20%3Ctwo%3E")
    assert status == 200
    assert "<title>one &amp; &lt;two&gt;</title>" in page
    status, text = ask(port, "/api/loss?run=three&run=one%20%26%20%3Ctwo%3E")
    assert [len(curve["steps"]) for curve in json.loads(text)] == [6, 6]
    assert ask(port, "/")[0] == 200
    assert ask(port, "/diff/three/one%20%26%20%3Ctwo%3E")[0] == 200
    assert ask(port, "/diff/three/..")[0] == 404
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before, "nothing is written"


@pytest.mark.parametrize(
    "name", ["..", "../secret", "..%2fsecret", "%2e%2e/secret", "link", "no-run", "/etc", ".", "", "%00"]
)
def test_nothing_outside_the_folder(port: int, name: str) -> None:
    for path in (f"/run/{name}", f"/{name}", f"/api/loss?run={name or '..'}"):
        status, text = ask(port, path)
        if path != "/":
            assert status == 404, path
        assert "root:" not in text
        assert "Captured" not in text


def test_only_this_machine_and_only_reading(port: int, root: Path) -> None:
    assert ask(port, "/", host="evil.example:80")[0] == 403
    assert ask(port, "/", host=f"localhost:{port}")[0] == 200
    for method in ("POST", "PUT", "DELETE"):
        assert ask(port, "/api/runs", method=method)[0] == 501
    server = make_server(root, 0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()
    with pytest.raises(FolderError, match="expected to listen"):
        make_server(root, port)


def test_a_run_itself_can_be_served(root: Path) -> None:
    assert find_run((root / "three").resolve(), "three").name == "three"


def test_curves_grow_in_the_browser(port: int, root: Path) -> None:
    with browser() as page:
        from selenium.webdriver.support.ui import WebDriverWait

        page.get(f"http://127.0.0.1:{port}/")
        wait = WebDriverWait(page, 20)
        wait.until(lambda each: len(each.find_elements("css selector", "tbody tr")) == 2)
        page.find_elements("css selector", "tbody input")[1].click()
        wait.until(lambda each: each.find_elements("css selector", ".uplot"))
        with (root / "three" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "loss": 1.125}\n')
        wait.until(lambda each: "1.1250" in each.find_element("css selector", "main").text)
        assert [
            entry
            for entry in page.get_log("browser")
            if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
        ] == []

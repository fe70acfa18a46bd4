"""A small server for the runs of a folder: list, reports, live loss curves, comparison. No torch.

It binds to 127.0.0.1, answers GET only, writes nothing, and reads nothing outside its folder: a run is named by one
part of a path, which must be that of a folder inside, links resolved. It answers requests for its own address only,
so that a page elsewhere cannot reach it by a name that points here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from meshloom.errors import FolderError, MeshloomError
from meshloom.view.diff import diff
from meshloom.view.report import diff_data, page, report_data
from meshloom.view.scene import folder, read_json, read_steps, scene

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_NAMES = ("127.0.0.1", "localhost")
_POINTS = 2000  # of a loss curve


def make_server(where: Path, port: int) -> ThreadingHTTPServer:
    """A server of the runs in `where` on 127.0.0.1, not yet running; raises FolderError."""
    if not where.is_dir():
        raise FolderError(f"{where}: expected a folder of runs, there is none")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, where.resolve()))
    except OSError as error:
        raise FolderError(
            f"port {port}: expected to listen there, got '{error.strerror}'; choose another --port"
        ) from error


def run_folders(root: Path) -> list[Path]:
    """Folders below the root that hold a run or traces; the root itself if it is one."""
    if _holds_run(root):
        return [root]
    inside = [path for path in sorted(root.iterdir()) if path.is_dir() and _is_inside(path, root)]
    return [path for path in inside if _holds_run(path)]


def _holds_run(path: Path) -> bool:
    return (path / "run.json").is_file() or any(path.glob("*.et*")) or any(path.glob("trace/*.et*"))


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root)


def find_run(root: Path, name: str) -> Path:
    """The run folder of a name; raises FolderError for anything else, `..` and links that lead out among it."""
    for path in run_folders(root):
        if path.name == name:
            return path
    raise FolderError("expected the name of a run of this folder")


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Name, state, plan, steps and last loss of each run; what cannot be read is told as its state."""
    rows = []
    for path in run_folders(root):
        try:
            facts, steps = read_json(path / "run.json"), read_steps(path / "metrics.jsonl")
            command = facts.get("command") or {}
            rows.append(
                {"name": path.name, "state": facts.get("state", "traces"), "model": command.get("model"),
                 "plan": command.get("plan"), "started": facts.get("started"), "num_steps": len(steps),
                 "max_steps": command.get("max_steps"), "loss": steps[-1].get("loss") if steps else None}
            )  # fmt: skip
        except (MeshloomError, AttributeError) as error:
            rows.append({"name": path.name, "state": f"unreadable: {error}"})
    return rows


def loss_curve(path: Path) -> dict[str, Any]:
    """Steps and losses of a run so far, thinned to about 2,000 points."""
    steps = [step for step in read_steps(path / "metrics.jsonl") if isinstance(step.get("loss"), (int, float))]
    every = max(1, len(steps) // _POINTS)
    kept = [step for place, step in enumerate(steps) if place % every == 0 or place == len(steps) - 1]
    return {"name": path.name, "state": read_json(path / "run.json").get("state"),
            "steps": [step["step"] + 1 for step in kept], "losses": [step["loss"] for step in kept]}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server_version = "meshloom"
    sys_version = ""

    def __init__(self, root: Path, *arguments: Any) -> None:
        self.root = root
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a GET; everything else is refused by http.server itself."""
        if (self.headers.get("Host") or "").rpartition(":")[0] not in _NAMES:
            self._say(HTTPStatus.FORBIDDEN, "text/plain", b"expected a request for 127.0.0.1\n")
            return
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.split("/") if part]
        try:
            kind, body = self._answer(parts, parse_qs(address.query))
            self._say(HTTPStatus.OK, kind, body)
        except MeshloomError as error:
            self._say(HTTPStatus.NOT_FOUND, "text/plain", f"{error}\n".encode())
        except Exception as error:  # of one request: the server goes on
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{type(error).__name__}\n".encode())

    def _answer(self, parts: list[str], query: dict[str, list[str]]) -> tuple[str, bytes]:
        match parts:
            case []:
                return "text/html", _index(self.root.name)
            case ["api", "runs"]:
                return "application/json", _json(list_runs(self.root))
            case ["api", "loss"]:
                return "application/json", _json(
                    [loss_curve(find_run(self.root, name)) for name in query.get("run", [])]
                )
            case ["run", name]:
                return "text/html", page(report_data(folder(find_run(self.root, name)))).encode("utf-8", "replace")
            case ["diff", one, other]:
                sides = [scene(find_run(self.root, name)) for name in (one, other)]
                return "text/html", page(diff_data(diff(*sides))).encode("utf-8", "replace")
        raise FolderError("expected /, /run/NAME, /diff/A/B, /api/runs or /api/loss?run=NAME")

    def _say(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers: dict[str, str] = {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the terminal shows the address only."""


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _index(name: str) -> bytes:
    room = resources.files("meshloom.view") / "page"
    part: Callable[[str], str] = lambda file: room.joinpath(*file.split("/")).read_text(encoding="utf-8")  # noqa: E731
    scripts = "\n".join(part(file) for file in ("vendor/uplot.js", "words.js", "table.js", "charts.js", "runs.js"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(name)}</title><style>{part("vendor/uplot.css")}{part("page.css")}</style></head>'
        f'<body><div id="page"></div><script>(() => {{\n{scripts}\n}})();</script></body></html>\n'
    ).encode()

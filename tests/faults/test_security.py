"""What the tree must not hold: pickle, eval, shell strings, servers that listen to everyone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("src/meshloom", "benchmarks", "examples", "docker")
               for path in (ROOT / folder).rglob("*.py"))  # fmt: skip

# Each with its reason: nothing of a file or a user reaches it.
ALLOWED = {
    ("model/tape.py", "exec"),  # runs text that is made of our own numbers and names
    ("benchmarks/package.py", "zipfile.ZipFile"),  # reads a list of names from a wheel that it has just built
    ("parallel/hosts.py", "0.0.0.0"),  # host 0 of several; only where the user names them
}
_FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.load", "torch.save", "yaml.load", "marshal.loads", "marshal.load",
    "tempfile.mktemp", "np.load", "numpy.load", "tarfile.open", "zipfile.ZipFile",
    "shutil.unpack_archive", "torch.hub.load",
}  # fmt: skip
_FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "xmlrpc", "telnetlib"}


def found(source: str) -> Iterator[str]:
    """What a module does that it must not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name.partition(".")[0] for alias in node.names} & _FORBIDDEN_MODULES
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _FORBIDDEN_MODULES:
            yield str(node.module)
        if isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield str(node.value)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_safe = name == "compile" or given.get("allow_pickle") == "False" or given.get("weights_only") == "True"
            if name in _FORBIDDEN_CALLS and not is_safe:
                yield name
            for option in ("shell", "allow_pickle", "trust_remote_code"):
                if given.get(option, "False") != "False":
                    yield option
            if given.get("weights_only") == "False":
                yield "weights_only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tree(path: Path) -> None:
    short = str(path.relative_to(ROOT)).removeprefix("src/meshloom/")
    assert [what for what in found(path.read_text(encoding="utf-8")) if (short, what) not in ALLOWED] == []


@pytest.mark.parametrize(
    ("source", "what"),
    [("import pickle", "pickle"), ("from dill import loads", "dill"), ("eval('1')", "eval"),
     ("import os; os.system('ls')", "os.system"), ("run('ls', shell=True)", "shell"), ("torch.load(x)", "torch.load"),
     ("np.load(x)", "np.load"), ("f(allow_pickle=True)", "allow_pickle"), ("bind('0.0.0.0')", "0.0.0.0"),
     ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code")],
)  # fmt: skip
def test_the_test_finds(source: str, what: str) -> None:
    assert what in list(found(source))


def test_what_is_allowed_is_there() -> None:
    for name, what in ALLOWED:
        folder = ROOT if name.startswith("benchmarks/") else ROOT / "src/meshloom"
        assert what in list(found((folder / name).read_text(encoding="utf-8")))

"""Pages for those who come from other tools: what they name exists, what they run runs, nothing is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from meshloom.cli.__main__ import cli
from tests.conftest import Meshloom

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("migration.md", "migration.ko.md")
# their files that need no counterpart: documents about themselves, and packaging
_NOT_MAPPED = {"PROJECT_SUMMARY.md", "README.md", "USAGE_GUIDE.md", "__init__.py", "docker-compose.yml"}
_OF_OTHERS = {"--index-url", "--version"}  # options of pip and nvcc


def _text(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def _spans(page: str) -> list[str]:
    """Every command of ours that the page names, in a sentence, a table or a block."""
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", _text(page))]
    return [span for span in spans if span.startswith("meshloom ")] + _blocks(page)


def _blocks(page: str) -> list[str]:
    return [
        line for block in re.findall(r"^```bash\n(.*?)^```$", _text(page), re.M | re.S) for line in block.splitlines()
    ]


def _resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words after it."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = click.Context(command)
        below = command.get_command(context, words[0])
        if below is None and words[0].startswith(("…", "COMMAND")):
            break
        assert below is not None, f"no command {words[0]!r}"
        command, words = below, words[1:]
    return command, words


def _options(command: click.Command) -> set[str]:
    return {name for item in command.params for name in (*item.opts, *item.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    spans = _spans(page)
    assert len(spans) > 30
    for span in spans:
        ours, _, after = span.partition(" -- ")
        command, words = _resolve(shlex.split(ours)[1:])
        for asked, given in ((command, words), *([_resolve(shlex.split(after))] if after else [])):
            unknown = {word for word in given if word.startswith("--")} - _options(asked)
            assert not unknown, f"{span}: {asked.name} has no {unknown}"


@pytest.mark.parametrize(
    "page", sorted((*(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md"))), ids=lambda path: path.name
)
def test_commands_of_every_page_exist(page: Path) -> None:
    """Also those that no test runs, because they need a hub, hours, or hosts."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S))
    lines = re.findall(r"^meshloom .*", blocks, re.M) + re.findall(r"(?<!`)`(meshloom [^`]+)`(?!`)", text)
    for line in lines:
        ours, _, after = " ".join(line.split("#")[0].split()).partition(" -- ")
        for part in filter(None, (ours.removeprefix("meshloom "), after)):
            command, words = _resolve(part.split())
            unknown = {word.split("=")[0] for word in words if word.startswith("--")} - _options(command)
            assert not unknown, f"{line}: {command.name} has no {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_options_on_the_right_exist_somewhere(page: str) -> None:
    known = set[str]()
    for name in cli.list_commands(click.Context(cli)):
        command, _ = _resolve([name])
        below = list(command.commands.values()) if isinstance(command, click.Group) else []
        known |= set[str]().union(*map(_options, [command, *below]))
    known |= _options(cli) | {"--no-python"}
    rows = [line.strip("|").split(" | ") for line in _text(page).splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    for theirs, ours in rows:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", ours)) - known
        assert not unknown, f"{theirs}: {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_theirs_is_left_out(page: str, shared: Path) -> None:
    documents = sorted((shared.parent / "seeds").glob("*.txt"))
    if not documents:
        pytest.skip("needs the documents of ../shared/seeds, which are not here")
    told = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    text = _text(page)
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", told)) - _OF_OTHERS
    assert len(options) > 40
    assert sorted(option for option in options if option not in text) == []
    files = set(re.findall(r"(?<![\w*<])[\w]+\.(?:sh|py|json|et|txt|bin|log|pid|png|svg|graphml|jsonl)\b", told))
    # files of one kind are named by their first: gpt2_1gpu, gpt2_2gpu, bert_8gpu; checkpoint-10, checkpoint-500
    kinds = {re.sub(r"(gpt2|bert)_\dgpu", "gpt2_2gpu", file) for file in files if "stacks" not in file} - _NOT_MAPPED
    assert len(kinds) > 40
    assert sorted(kind for kind in kinds if kind not in text) == []


def test_both_languages_map_the_same_things() -> None:
    def ours(page: str) -> list[str]:
        return sorted(span for span in _spans(page) if "--" in span)

    assert ours("migration.ko.md") == ours("migration.md")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moved")


@pytest.mark.parametrize("command", _blocks("migration.md"))
def test_commands_run(command: str, desk: Path, meshloom: Meshloom) -> None:
    result = meshloom(*shlex.split(command)[1:], cwd=desk)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_files_that_are_promised(desk: Path) -> None:
    run = desk / "moved" / "gpt2"
    for name in (
        "trace/rank0.et", "trace/rank1.et", "trace/rank0.device.json", "trace/rank0.host.json", "trace/rank0.ops.txt",
        "trace/rank0.stacks.txt", "checkpoints/initial_model/config.json", "checkpoints/checkpoint-3/model.safetensors",
        "checkpoints/checkpoint-3/training_info.json", "checkpoints/best_model/model.safetensors",
        "logs/rank0.jsonl", "logs/rank1.jsonl", "metrics.jsonl",
        "run.json",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    assert (desk / "moved" / "steps" / "decode" / "rank1.et").is_file()
    assert (desk / "moved" / "served" / "config.json").is_file()
    for name in ("trace_graph.png", "trace_graph.json", "comm_graph.png", "trace_chakra.json"):
        for folder in ("synth", "steps/prefill", "steps/decode"):
            assert (desk / "moved" / folder / f"tensor_{name}").is_file(), (folder, name)

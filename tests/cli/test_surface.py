"""The command line's surface: help without torch, an example for each command, exit codes, one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click import Group
from click.testing import CliRunner

from meshloom.cli.__main__ import COMMANDS, cli
from tests.conftest import Meshloom

OPTIONS = {
    "demo": ["--cluster", "--max-steps", "--out", "--synth-plan"],
    "doctor": ["--data", "--device", "--json", "--model", "--tokenizer"],
    "experiments": ["--json", "--list", "--out", "--set", "--tiny"],
    "runs": ["--dir", "--json"],
    "runs show": ["--json"],
    "runs logs": ["--follow", "--rank"],
    "runs stop": ["--now", "--patience"],
    "runs resume": ["--background"],
    "train": [
        "--attention", "--background", "--batch-size", "--cache-dir", "--collective-timeout", "--compile", "--data",
        "--device", "--dry-run", "--epochs", "--eval-data", "--eval-fraction", "--eval-sequences", "--eval-steps",
        "--from-scratch",
        "--gradient-accumulation", "--hardware", "--json", "--keep-last", "--launcher", "--learning-rate",
        "--log-steps", "--lr-schedule", "--max-grad-norm", "--max-restarts", "--max-steps", "--model", "--nnodes",
        "--no-save-initial", "--node-rank", "--objective", "--out", "--plan", "--precision", "--rdzv-endpoint",
        "--recompute", "--resume", "--save-steps", "--schedule", "--seed", "--seq-length", "--shard-cache",
        "--skip-bad-lines", "--stage-layers", "--styles", "--test", "--text-field", "--tokenizer", "--trace",
        "--trace-active",
        "--trace-separate", "--trace-stacks", "--trace-step", "--trace-wait", "--trace-warmup", "--train",
        "--virtual-stages", "--wandb", "--warmup-steps", "--weight-decay", "--zero",
    ],
    "data prepare": ["--force", "--json", "--out"],
    "tokenizer train": ["--data", "--json", "--kind", "--out", "--skip-bad-lines", "--text-field", "--vocab-size"],
    "generate": [
        "--batch-size", "--compile", "--device", "--dtype", "--eos", "--ignore-eos", "--json", "--max-new-tokens",
        "--model", "--no-cuda-graph", "--num-input-tokens", "--plan", "--prompt", "--prompts-file", "--random-weights",
        "--seed", "--shard-cache", "--styles", "--temperature", "--tokenizer", "--top-k", "--top-p", "--trace",
        "--visualize-trace",
    ],
    "launch": ["--plan", "--port", "--rank", "--timeout"],
    "capture": ["--json", "--out", "--rank"],
    "parallelize": ["--certify", "--dtype", "--explain", "--gradient-accumulation", "--layers", "--model",
                    "--objective", "--out", "--plan", "--schedule", "--stage-layers", "--styles", "--virtual-stages"],
    "synth": [
        "--batch-size", "--capture-all", "--device", "--force", "--global-batch", "--gradient-accumulation",
        "--inference", "--json", "--max-grad-norm", "--micro-batch", "--model", "--no-fused", "--num-input-tokens",
        "--num-output-tokens", "--objective", "--out", "--plan", "--precision", "--recompute", "--roles",
        "--schedule", "--seq-length", "--stage-layers", "--styles", "--temperature", "--top-k", "--top-p",
        "--virtual-stages", "--visualize-trace", "--zero",
    ],
    "check": ["--json", "--strict"],
    "convert": ["--passes", "--plan", "--schema"],
    "info": ["--json"],
    "simulate": ["--cluster", "--compute", "--gradient-accumulation", "--hw-config", "--json", "--micro-batch",
                 "--model", "--out", "--plan", "--recompute", "--schedule", "--seq-length", "--tokens",
                 "--virtual-stages"],
    "what-if": ["--cluster", "--compute", "--json", "--remove-comm", "--scale"],
    "advise": ["--cluster", "--devices", "--dtype", "--global-batch", "--hw-config", "--json", "--memory", "--model",
               "--pareto", "--seq-length", "--stack"],
    "calibrate": ["--device", "--here", "--name", "--out"],
    "export": ["--cluster", "--out", "--quantize", "--to"],
    "view graph": ["--collapse", "--comm", "--depth", "--format", "--layers", "--out", "--phase", "--rank"],
    "view timeline": ["--format", "--out"],
    "stats": ["--json", "--stacks", "--times", "--top"],
    "diff": ["--html", "--json", "--top"],
    "report": ["--cluster", "--open", "--out"],
    "serve": ["--open", "--port"],
}  # fmt: skip


def test_the_surface_is_pinned() -> None:
    context = cli.make_context("meshloom", ["--help"], resilient_parsing=True)
    found = {}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        below = (
            {f"{name} {part}": item for part, item in command.commands.items()} if isinstance(command, Group) else {}
        )
        own = {name: command} if command.params or not below else {}
        for full, part in (own | below).items():
            shown = [item for item in part.params if not getattr(item, "hidden", False)]
            found[full] = sorted(option for item in shown for option in item.opts if option.startswith("--"))
    assert found == OPTIONS


@pytest.mark.parametrize("name", [*COMMANDS, *(name for name in OPTIONS if " " in name)])
def test_every_command_has_help_with_an_example(name: str) -> None:
    text = CliRunner().invoke(cli, [*name.split(), "--help"]).output
    assert f"meshloom {name}" in text.partition("Example")[2]


def test_help_and_reading_a_trace_import_no_torch(demo_run: Path) -> None:
    program = """
import sys
from meshloom.cli.__main__ import _run
run = sys.argv[1]
for arguments in (["--help"], ["runs"], ["check", run], ["simulate", run], ["report", run], ["stats", run],
                  ["diff", run], ["view", "graph", run, "--out", run + "/other.svg"],
                  ["view", "timeline", run]):
    assert _run(arguments) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(demo_run)], check=True, capture_output=True, timeout=60)


TRAIN = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--max-steps", "1")
SYNTH = ("synth", "--model", "gpt2-tiny")
GENERATE = ("generate", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--random-weights", "--prompt", "Once")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nosuch",), "No such command 'nosuch'"),
        (("train",), "Missing option '--model'"),
        ((*TRAIN, "--plan", "tp5"), "c_attn has 4 heads, fewer than the ranks of tp5"),
        ((*TRAIN, "--plan", "dp2.x"), "got 'x'; write degrees joined by dots"),
        ((*TRAIN, "--plan", "dp4000000"), "use fewer ranks"),
        ((*TRAIN, "--plan", "pp3"), "expected at least 3 layers for as many stages, got 2"),
        ((*TRAIN, "--plan", "pp2", "--schedule", "interleaved", "--virtual-stages", "2"), "expected at least 4 layers"),
        ((*TRAIN, "--seq-length", "257"), "expected at most 256"),
        ((*TRAIN, "--trace", "--trace-step", "2"), "expected at most --max-steps"),
        ((*TRAIN, "--trace", "--trace-active", "2"), "expected at most 1 steps"),
        ((*GENERATE, "--prompt", ""), "prompt 2: expected at least one token, got an empty prompt"),
        ((*GENERATE, "--prompt", "long" * 100), "prompt 2: expected at most 256 tokens"),
        ((*GENERATE, "--max-new-tokens", "253"), "got 4 and --max-new-tokens 253"),
        ((*GENERATE, "--top-p", "0"), "expected a number above 0 and at most 1"),
        ((*GENERATE, "--top-p", "1.1"), "expected a number above 0 and at most 1"),
        ((*GENERATE, "--top-k", "-1"), "expected a whole number of at least 0"),
        ((*GENERATE, "--plan", "dp2"), "expected tp and pp only"),
        ((*GENERATE, "--plan", "tp2", "--compile"), "--compile: expected a plan of one rank, got tp2"),
        ((*GENERATE, "--plan", "tp5"), "fewer than the ranks of tp5"),
        ((*GENERATE, "--trace", "full"), "expected a new or empty folder"),
        ((*GENERATE, "--trace", "new", "--max-new-tokens", "1"), "expected at least 2, to record a decode step"),
        ((*GENERATE, "--visualize-trace"), "expected --trace too"),
        ((*GENERATE, "--prompts-file", "empty"), "expected at least one prompt, found none"),
        ((*GENERATE, "--prompts-file", "missing"), "expected a file with a prompt a line"),
        ((*GENERATE, "--prompts-file", "bad.jsonl"), "bad.jsonl:2: expected a text"),
        ((*GENERATE[:5], "--prompt", "Once"), "expected a model with weights, found none"),
        ((*GENERATE[:3], "--random-weights"), "expected --prompt, --prompts-file, or --num-input-tokens"),
        (("generate", "--model", "small", *GENERATE[3:]), "expected at most 100 tokens, which is the model's vocab"),
        (("launch", "--rank", "2", "--plan", "dp2", "--", *TRAIN), "expected a rank from 0 to 1, got 2"),
        (("launch", "--rank", "0", "--plan", "dp2", "--", *TRAIN, "--plan", "dp2"), "expected --plan before -- only"),
        (
            ("launch", "--rank", "0", "--plan", "dp2", "--", "synth"),
            "expected one of train, generate after --, got 'synth'",
        ),
        (("launch", "--rank", "0", "--plan", "tp5", "--", *TRAIN, "--out", "new"), "fewer than the ranks of tp5"),
        (("launch", "--rank", "1", "--plan", "dp2", "--", *TRAIN), "expected --out where each rank"),
        (("launch", "--rank", "1", "--plan", "dp2"), "Missing argument"),
        (("convert", "a.txt", "b"), "expected --plan with a text workload"),
        (("convert", "a.et", "b.et", "--plan", "dp2"), "go with a text workload"),
        (("convert", "a.txt", "b", "--plan", "pp2"), "expected a plan of tp and dp"),
        (("capture", "convert"), "expected one file"),
        ((*TRAIN, "--test", "--train"), "--test: expected it alone"),
        ((*TRAIN, "--epochs", "2"), "expected it or --max-steps"),
        ((*TRAIN[:5], "--train"), "--train: expected --data"),
        ((*TRAIN, "--eval-steps", "2"), "expected --eval-data or --eval-fraction with it"),
        ((*TRAIN, "--eval-fraction", "0.1", "--eval-data", "sample"), "expected it or --eval-data"),
        ((*TRAIN, "--eval-fraction", "0.001"), "expected a share that leaves sequences on both sides"),
        ((*TRAIN, "--eval-data", "missing.json"), "there is no such file"),
        ((*TRAIN, "--attention", "flash"), "expected --precision bf16 or fp16"),
        ((*TRAIN, "--attention", "flash", "--precision", "bf16"), "expected the package flash-attn"),
        ((*TRAIN, "--hardware", "abacus"), "abacus"),
        ((*TRAIN, "--out", "file"), "expected to make a folder here"),
        ((*TRAIN, "--out", "full"), "expected a new or empty folder"),
        ((*TRAIN, "--data", "missing.json"), "there is no such file"),
        ((*TRAIN, "--data", "file"), "rename it or convert it"),
        ((*TRAIN, "--data", "no-squad.json"), "expected JSON in SQuAD format"),
        ((*TRAIN, "--data", "sample:1"), "with every --data or with none"),
        (("data", "prepare", "missing.toml", "--out", "a.jsonl"), "expected a recipe (TOML)"),
        (("data", "prepare", "file", "--out", "a.jsonl"), "expected a recipe with [[source]] tables"),
        (("tokenizer", "train", "--data", "sample", "--vocab-size", "9", "--out", "new"), "expected at least 262"),
        (("tokenizer", "train", "--data", "sample", "--vocab-size", "300", "--out", "full"), "a new or empty folder"),
        ((*TRAIN, "--data", "other.json"), "got no 'data'"),
        ((*TRAIN, "--data", "zero.json"), "at least one question"),
        ((*TRAIN, "--model", "./missing"), "no such path"),
        ((*TRAIN, "--model", "full"), "expected a folder with config.json"),
        ((*TRAIN, "--model", "other.json"), "a JSON object with a model_type"),
        ((*TRAIN, "--model", "odd.json"), "transformers cannot read this config"),
        ((*TRAIN, "--tokenizer", "full"), "expected a folder with a tokenizer"),
        (("synth", "--model", "gpt2-tiny", "--plan", "dp2", "--out", "full"), "expected a new or empty folder"),
        ((*SYNTH, "--inference", "--plan", "dp2", "--out", "new"), "expected tp and pp only"),
        (
            (*SYNTH, "--inference", "--plan", "tp2", "--seq-length", "8", "--out", "new"),
            "expected with a training step",
        ),
        ((*SYNTH, "--num-input-tokens", "8", "--plan", "tp2", "--out", "new"), "expected with inference"),
        ((*SYNTH, "--inference", "--plan", "tp2", "--num-input-tokens", "9000", "--out", "new"), "expected at most"),
        ((*SYNTH, "--inference", "--plan", "tp2", "--top-p", "1.5", "--out", "new"), "at most 1"),
        (("synth", "--model", "gpt2-tiny", "--plan", "tp8", "--out", "new"), "fewer than the ranks of tp8"),
        (("check", "missing"), "No such file"),
        (("check", "file"), "or no Chakra trace"),
        (("check", "empty"), "the file is empty"),
        (("simulate", "full"), "found none"),
        (("simulate", "full", "--hw-config", "other.json"), "expected 'devices'"),
        (("experiments", "missing.toml"), "expected a TOML file with [matrix]"),
        (("experiments", "--set", "data"), "expected NAME=VALUE"),
        (("experiments", "--set", "nosuch=1"), "expected options of `meshloom train`, got 'nosuch'"),
        (("experiments", "--set", "resume=a"), "expected options of `meshloom train`, got 'resume'"),
        (("simulate",), "expected a trace, a folder of them, or --model"),
        (("simulate", "full", "--plan", "dp2"), "--plan: expected --model with it"),
        (("simulate", "--model", "mixtral-8x7b", "--plan", "tp3"), "expected tp to divide 32 heads"),
        (("simulate", "full", "--tokens", "0"), "--tokens"),
        (("simulate", "--model", "gpt2", "--tokens", "5"), "expected without --tokens"),
        (("export", "full", "--to", "astra-sim", "--out", "full"), "expected a new or empty folder"),
        (("export", "full", "--to", "onnx", "--out", "new"), "expected a checkpoint, a run with one"),
        (("export", "full", "--to", "onnx", "--quantize", "int8", "--out", "new"), "expected --to hugging-face"),
        (("calibrate", "full", "--device", "h100-sxm", "--out", "new.toml"), "found none"),
        (("calibrate", "--out", "new.toml"), "expected a folder of traces, or --here"),
        (("calibrate", "full", "--out", "new.toml"), "expected the data sheet to start from"),
        (("calibrate", "--here", "--device", "h100-sxm", "--out", "new.toml"), "expected cpu"),
        (("what-if", "full", "--scale", "disk=2x"), "found none"),
        (("advise", "--model", "gpt2", "--global-batch", "8", "--memory", "80 parsecs"), "such as 80GB"),
        (("advise", "--model", "gpt2", "--global-batch", "8", "--memory", "1MB"), "the smallest needs"),
        (("advise", "--model", "gpt2", "--global-batch", "8", "--devices", "12"), "expected a multiple of 8"),
        (("report", "full"), "found neither"),
        (("report", "missing"), "expected a run folder"),
        (("capture", "full"), "rank<r>.host.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from meshloom.cli.__main__ import _run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a Chakra trace, and no JSON either")
    (tmp_path / "empty").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "zero.json").write_text('{"data": []}')
    (tmp_path / "no-squad.json").write_text("no JSON")
    (tmp_path / "odd.json").write_text('{"model_type": "no-such-type"}')
    (tmp_path / "bad.jsonl").write_text('"a prompt"\n{"text": 1}\n')
    (tmp_path / "small").mkdir()
    config = {"model_type": "gpt2", "vocab_size": 100, "n_layer": 1, "n_embd": 8, "n_head": 2}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    assert _run(list(arguments)) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert said.startswith("meshloom: ")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind, nothing is lost"


def test_debug_shows_the_traceback(meshloom: Meshloom, tmp_path: Path) -> None:
    result = meshloom("--debug", "check", str(tmp_path / "missing"))
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_results_as_json(demo_run: Path, meshloom: Meshloom) -> None:
    assert json.loads(meshloom("check", str(demo_run), "--json").stdout) == []
    told = json.loads(meshloom("simulate", str(demo_run), "--json").stdout)
    assert told["world_size"] == 2
    assert 0 < told["compute_share"] <= 1
    facts = json.loads(meshloom("info", str(demo_run), "--json").stdout)
    assert set(facts) == {"0", "1"}
    traffic = facts["0"]["summary"]["traffic"]
    assert {(item["kind"], item["axis"]) for item in traffic} == {("all_reduce", "dp")}
    assert sum(item["count"] * item["num_bytes"] for item in traffic) == 463_360 * 4
    assert facts["1"]["file"]["rank"] == 1
    assert facts["1"]["duration_ns"] > 0


def test_faults_give_exit_code_1(demo_run: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    import msgspec

    from meshloom import Trace, read, write

    trace = read(demo_run / "trace" / "rank0.et")
    last = msgspec.structs.replace(trace.nodes[-1], data_deps=[10**9])
    write(Trace(nodes=[*trace.nodes[:-1], last], attrs=trace.attrs), tmp_path / "rank0.et")
    result = meshloom("check", str(tmp_path / "rank0.et"))
    assert result.returncode == 1
    assert "dangling-dependency" in result.stdout


def test_training_tells_its_result_as_json(meshloom: Meshloom, tmp_path: Path) -> None:
    result = meshloom(*TRAIN, "--json", "--seq-length", "16", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_steps"] == 1


def test_parallelize_explains_and_certifies(meshloom: Meshloom, tmp_path: Path) -> None:
    size = ["--model", "gpt2-tiny", "--plan", "tp2.pp2"]
    result = meshloom("parallelize", *size, "--certify", "--dtype", "float64", "--out", str(tmp_path / "told.json"))
    assert result.returncode == 0, result.stderr
    assert "stage 1 on pipeline rank 1: transformer.h.1" in result.stdout
    told = json.loads((tmp_path / "told.json").read_text())
    styles = {row["module"]: row["style"] for row in told["layers"]}
    assert styles["transformer.h.0.attn.c_attn"] == "column"
    assert styles["lm_head"] == styles["transformer.wte"] == "vocabulary"
    assert told["certificate"]["passes"]
    assert 0 < told["certificate"]["gradient"] < 1e-12

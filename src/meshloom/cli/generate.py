"""`meshloom generate`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.cli.styles import styles_option, take_styles
from meshloom.errors import DataError, FolderError, ModelError, RunFailed, UsageError
from meshloom.plan import Plan

_TRACED = 2  # the decode step that is recorded: not the first, which makes what later ones find


@click.command()
@click.option(
    "--model",
    required=True,
    help="A folder with weights, a checkpoint or run of `train`, or a hub id; with --random-weights also a preset or a "
    "config.json.",
)
@click.option("--plan", default="dp1", show_default=True, help="How the work is cut, such as tp2 or tp2.pp2.")
@styles_option
@click.option("--prompt", multiple=True, help="What to continue; several are continued together.")
@click.option(
    "--prompts-file", help="A file with a prompt a line (.txt), or a JSON text or object with 'prompt' a line (.jsonl)."
)
@click.option(
    "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Tokens a prompt, at most."
)
@click.option(
    "--temperature",
    type=float,
    help="What logits are divided by; 0 takes the likeliest.  [default: 0, or 1 with --top-k or --top-p]",
)
@click.option("--top-k", default=0, show_default=True, type=int, help="Draw among the k likeliest; 0: all.")
@click.option(
    "--top-p", default=1.0, show_default=True, type=float, help="Draw among the likeliest that hold this probability."
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 1 << 40),
    help="Equal seeds give equal tokens on every plan.",
)
@click.option(
    "--eos", multiple=True, type=click.IntRange(0), help="A token that ends a text; several.  [default: the model's]"
)
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-new-tokens.")
@click.option("--batch-size", type=click.IntRange(1), help="Prompts that are continued together.  [default: all]")
@click.option(
    "--num-input-tokens",
    type=click.IntRange(1),
    help="Repeat or cut each prompt to so many tokens; without a prompt, draw them.",
)
@click.option("--tokenizer", help="A tokenizer folder, a hub id, or 'bytes'.  [default: that of --model]")
@click.option("--random-weights", is_flag=True, help="Draw the weights: for traces and times, from a config alone.")
@click.option("--shard-cache", help="A folder that keeps each rank's part of the weights for the next time.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Of weights and cache.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--no-cuda-graph", is_flag=True, help="On a GPU: launch each kernel of a decode step by itself.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the decode step with torch.compile; on one rank.")
@click.option("--trace", help="A new folder: record the prefill and one decode step on each rank as Chakra traces.")
@click.option("--visualize-trace", is_flag=True, help="With --trace: draw both, tensor_trace_graph.png and three more.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
def command(**options: Any) -> None:
    """Continue prompts with a model on a plan of ranks; text comes as it is made.

    \b
    Examples:
      meshloom generate --model runs/gpt2-tiny.dp2.20261121-120000 --plan tp2 --prompt "Once upon a time,"
      meshloom generate --model DIR --plan tp2.pp2 --prompts-file prompts.txt --temperature 0.7 --top-k 50 --top-p 0.9
      meshloom generate --model config.json --random-weights --plan tp2 --num-input-tokens 512 --max-new-tokens 3 \\
          --trace decode-trace
    """
    result = generate(**options)
    if result is None:
        return
    if options["as_json"]:
        click.echo(json.dumps(result))
        return
    click.echo(_sentence(result))


def generate(
    *,
    model: str,
    plan: str,
    prompt: Sequence[str] = (),
    prompts_file: str | None = None,
    device: str = "auto",
    trace: str | None = None,
    visualize_trace: bool = False,
    as_json: bool = False,
    **options: Any,
) -> dict[str, Any] | None:
    """Generate as the command does and return what it prints; None on ranks of a torchrun other than 0."""
    cut = Plan.parse(plan)
    if visualize_trace and trace is None:
        raise UsageError("--visualize-trace: expected --trace too, the folder of what is drawn")
    folder = _new_folder(trace) if trace is not None else None
    texts = [*prompt, *(_read_prompts(Path(prompts_file)) if prompts_file is not None else ())]
    sampling = _sampling(options)  # before torch is imported, if it cannot be

    from meshloom.parallel.launch import run_ranks, world_from_environment

    world = world_from_environment()
    if world is not None:
        cut.with_world_size(world[1])
    job = _job(model, cut, texts, sampling, traced=folder is not None, **options)
    around = _recorder(folder, cut, model) if folder is not None else None

    from meshloom.generate.run import RESULT, generate_rank

    logs = Path(tempfile.mkdtemp(prefix="meshloom-generate-"))
    arguments = (job, str(logs), device, around, not as_json)
    try:
        if world is None:
            run_ranks(generate_rank, *arguments, num_ranks=cut.world_size, log_dir=logs)
        else:
            generate_rank(*arguments)
            if world[0] != 0:
                return None
        result: dict[str, Any] = json.loads((logs / RESULT).read_text(encoding="utf-8"))
    except RunFailed:
        raise  # its message names the logs
    except BaseException:
        shutil.rmtree(logs, ignore_errors=True)
        raise
    shutil.rmtree(logs, ignore_errors=True)
    return result | {"model": model, **(_traces(folder, draw=visualize_trace) if folder is not None else {})}


def _sampling(options: dict[str, Any]) -> Any:
    temperature, top_k, top_p = options.pop("temperature"), options.pop("top_k"), options.pop("top_p")
    if temperature is None:
        temperature = 1.0 if top_k or top_p < 1 else 0.0

    from meshloom.generate.sample import Sampling

    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=options["seed"])


def _job(
    model: str,
    plan: Plan,
    texts: Sequence[str],
    sampling: Any,
    *,
    max_new_tokens: int,
    seed: int,
    eos: Sequence[int],
    ignore_eos: bool,
    batch_size: int | None,
    num_input_tokens: int | None,
    tokenizer: str | None,
    random_weights: bool,
    shard_cache: str | None,
    dtype: str,
    no_cuda_graph: bool,
    compiled: bool,
    traced: bool,
    styles: str | None = None,
) -> Any:
    """What is generated, found and checked before any process is started."""
    from meshloom.generate.run import Job, check_job
    from meshloom.model.config import eos_ids, load_config, load_tokenizer
    from meshloom.model.pretrained import find_weights

    where = checkpoint_of(model)
    config = load_config(where)
    weights = None if random_weights else find_weights(where)
    if weights is None and not random_weights:
        raise ModelError(f"{model}: expected a model with weights, found none; give --random-weights to draw them")
    if not texts and num_input_tokens is None:
        raise UsageError("expected --prompt, --prompts-file, or --num-input-tokens for a prompt that is drawn")
    reads = load_tokenizer(tokenizer or where) if texts or tokenizer else None
    job = Job(
        config=config,
        plan=plan,
        prompts=_prompts(texts, reads, num_input_tokens, config.vocab_size, seed),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        batch_size=batch_size or max(1, len(texts)),
        tokenizer=reads,
        eos_ids=frozenset() if ignore_eos else frozenset(eos) or eos_ids(where, config, reads),
        weights=None if weights is None else str(weights),
        shard_cache=shard_cache,
        seed=seed,
        dtype=dtype,
        cuda_graph=not no_cuda_graph,
        styles=take_styles(styles),
        compiled=compiled,
        traced_step=min(_TRACED, max(1, max_new_tokens - 1)) if traced else None,
    )
    check_job(job)
    return job


def _prompts(
    texts: Sequence[str], tokenizer: Any, num_tokens: int | None, vocab_size: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each prompt, repeated or cut to `num_tokens` if that is given; drawn ones if there is no text."""
    if not texts:
        import random

        draw = random.Random(seed)
        return (tuple(draw.randrange(vocab_size) for _ in range(num_tokens or 0)),)
    rows = [tuple(tokenizer(text)["input_ids"]) if text else () for text in texts]
    if num_tokens is None:
        return tuple(rows)
    return tuple((row * (num_tokens // len(row) + 1))[:num_tokens] if row else row for row in rows)


def checkpoint_of(model: str) -> str:
    """The newest checkpoint that can be read if `model` is the folder of a run, else itself."""
    folder = Path(model)
    if not (folder / "run.json").is_file():
        return model

    from meshloom.train.checkpoint import newest

    found, troubles = newest(folder / "checkpoints")
    if found is None:
        why = f" that can be read: {troubles[0]}" if troubles else ""
        raise FolderError(f"{folder}: expected a run with a checkpoint{why}; train with --save-steps")
    for trouble in troubles:
        click.echo(f"meshloom: warning: {trouble}; using an older one", err=True)
    return str(found)


def _read_prompts(path: Path) -> list[str]:
    """A prompt a line; blank lines of a text file are left out, which separates nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a file with a prompt a line, got '{error}'") from error
    if path.suffix != ".jsonl":
        found = [line for line in lines if line.strip()]
    else:
        found = [_from_json(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"{path}: expected at least one prompt, found none")
    return found


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: expected JSON, got '{error}'") from error
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: expected a text, or an object with a text 'prompt', got {line[:60]}")
    return text


def _new_folder(trace: str) -> Path:
    folder = Path(trace)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{trace}: expected a new or empty folder; choose another --trace")
    return folder


def _recorder(folder: Path, plan: Plan, model_name: str) -> Any:
    """What stands around each step: recorders of the capture room for the prefill and one decode step, on each rank."""

    def make(mesh: Any, model: Any) -> Any:
        from contextlib import nullcontext

        from meshloom.capture.record import Recorder
        from meshloom.parallel.mesh import axis_groups

        steps = {
            number: Recorder(
                folder / name,
                step=number,
                model=model,
                axes=axis_groups(plan, mesh.rank),
                facts={"plan": str(plan), "model": model_name},
            )
            for name, number in (("prefill", 0), ("decode", _TRACED))
        }
        return lambda step: steps[step](step) if step in steps else nullcontext()

    return make


def _traces(folder: Path, *, draw: bool) -> dict[str, Any]:
    """The traces that were left, what is wrong in them, and their pictures."""
    from meshloom.view.graph_files import visualize_trace

    found: dict[str, Any] = {"traces": [], "faults": [], "pictures": []}
    for name in ("prefill", "decode"):
        traces = read_all(folder / name)
        found["traces"] += [str(path) for path in sorted((folder / name).glob("*.et"))]
        found["faults"] += [str(fault) for fault in check(traces)]
        if draw:
            found["pictures"] += [str(path) for path in visualize_trace(traces[0], folder / name)]
    return found


def _sentence(result: dict[str, Any]) -> str:
    per_token, p90 = result["ms_per_token_median"], result["ms_per_token_p90"]
    text = f"{result['num_new_tokens']} tokens: first after {result['time_to_first_token_ms']:.1f} ms"
    if per_token is not None:
        text += f", then {per_token:.2f} ms each (median; p90 {p90:.2f} ms)"
    text += f", {result['tokens_per_second']:,.1f} tokens/s"
    memory = [
        f"rank {one['rank']} {_bytes(one['weight_bytes'])} of weights, {_bytes(one['cache_bytes'])} of cache, "
        f"{_bytes(one['peak_bytes'])} in all"
        for one in result["memory"]
    ]
    text += "\nmemory: " + "; ".join(memory)
    if result.get("traces"):
        faults = result["faults"]
        traces = result["traces"]
        told = f"{len(faults) or 'no'} fault{'s' * (len(faults) != 1)}"
        text += f"\ntraces: {traces[0]} … {traces[-1]}, {told}"
        text += "".join(f"\n{fault}" for fault in faults[:20])
    if result.get("pictures"):
        text += "\npictures: " + ", ".join(result["pictures"])
    return text


def _bytes(count: int) -> str:
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if count >= size), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"

"""`meshloom`: commands are loaded when they are called, so that help needs no torch.

A mistake is one line and exit code 2.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

import meshloom
from meshloom.errors import MeshloomError

# command -> what `meshloom --help` says of it; its code is `command` in meshloom.cli.<name>
COMMANDS = {
    "demo": "The whole road in one go: train, trace, check, synthesise, simulate, report.",
    "doctor": "See whether training can run here, and how fast.",
    "train": "Train a model on a plan of ranks, and record a step if asked.",
    "generate": "Continue prompts with a model on a plan of ranks, and record its steps if asked.",
    "launch": "Run one rank of a command in this terminal, so that a debugger works in it.",
    "experiments": "Run a matrix of trainings, skipping what is done.",
    "runs": "List runs, and look into, stop or resume one.",
    "data": "Make data for training: mix sources by a recipe.",
    "tokenizer": "Train a tokenizer.",
    "capture": "Make Chakra traces again from the files that a recorded step left.",
    "parallelize": "Say how a model is cut by a plan and why, and certify that it computes the same.",
    "synth": "Synthesise the traces of a training step on ranks that you do not have.",
    "check": "Check traces for faults.",
    "convert": "Convert a trace between .et, .et.gz, Chakra JSON, node-link JSON and GraphML.",
    "info": "Say what a trace holds.",
    "simulate": "Predict when traces would run on a cluster.",
    "what-if": "Ask what a step would take with other hardware, or without some communication.",
    "advise": "Search the best plan of a model on a cluster.",
    "calibrate": "Write a device file from recorded traces, or from kernels timed here.",
    "export": "Write a folder that others run: traces for a simulator, a model to serve.",
    "view": "Draw a step as a graph, or as a timeline for Perfetto.",
    "stats": "Say where a step's time went: top ops, exposed communication, idle.",
    "diff": "Compare two traces, or measured with predicted.",
    "report": "Write one HTML page about a run.",
    "serve": "Show all runs of a folder in the browser.",
}

# what a system says of a path or a disk: no fault of ours, so that it needs no traceback
_PLACES = {
    errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
}  # fmt: skip


class _Lazy(click.Group):
    """A group that imports a command's module only when the command runs or its own help is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, imported now."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"meshloom.cli.{name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of `COMMANDS`, so that help imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(meshloom.__version__, prog_name="meshloom")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Weave any single-device Hugging Face model onto a device mesh, real or imagined.

    \b
    Examples:
      meshloom demo
      meshloom train --model gpt2-tiny --data sample --tokenizer bytes --plan dp2 --max-steps 20 --trace
      meshloom synth --model gpt2 --plan tp2.dp4 --out synth.gpt2
      meshloom simulate synth.gpt2 --cluster h100x8
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failure, 2 a mistake in what was asked, 130 interrupted."""
    # PyTorch's native code logs each start of its observers; what matters, Meshloom says itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # What is imported may count GPUs, which starts CUDA's driver unless NVML is asked; ranks are forked after that.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        result: Any = cli.main(arguments, prog_name="meshloom", standalone_mode=False)
    except MeshloomError as error:
        if debug:
            raise
        _say(str(error))
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        _say(error.format_message() + hint)
        return 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; everything that was started has been ended")
        return 130
    except BrokenPipeError:  # `meshloom info … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in _PLACES:
            raise
        _say(f"{_short(str(error.filename or ''))}: expected a place to read or write, got '{error.strerror}'")
        return 2
    return result if isinstance(result, int) else 0


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}…{path[-60:]}"


def _say(message: str) -> None:
    click.echo(f"meshloom: {' '.join(message.split())}", err=True)


if __name__ == "__main__":
    main()

"""`meshloom launch`."""

from __future__ import annotations

import shlex
from typing import Any

import click

from meshloom.errors import UsageError
from meshloom.plan import Plan

_OF_RANKS = ("train", "generate")  # commands that run on ranks which others have started


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--rank", required=True, type=click.IntRange(0), help="Which rank this terminal runs.")
@click.option("--plan", required=True, help="How the work is cut, such as dp2 or tp2.dp2; the same for all ranks.")
@click.option("--port", default=29500, show_default=True, type=click.IntRange(1, 65535), help="Where ranks meet.")
@click.option("--timeout", default=600.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Seconds to wait for the other ranks.")  # fmt: skip
@click.argument("command_line", metavar="-- COMMAND [OPTIONS]", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_context
def command(
    context: click.Context, rank: int, plan: str, port: int, timeout: float, command_line: tuple[str, ...]
) -> Any:
    """Run one rank of a command in this terminal, so that a debugger works in it.

    Start one in a terminal for each rank; they meet on a port of this host. A breakpoint() stops one rank, and the
    others wait for it.

    \b
    Examples, in two terminals:
      meshloom launch --rank 0 --plan dp2 -- train --model gpt2-tiny --tokenizer bytes --data sample --out runs/a
      meshloom launch --rank 1 --plan dp2 -- train --model gpt2-tiny --tokenizer bytes --data sample --out runs/a
    """
    cut = Plan.parse(plan)
    cut.coordinate(rank)  # raises PlanError if there is no such rank
    name, *options = command_line
    if name not in _OF_RANKS:
        raise UsageError(f"launch: expected one of {', '.join(_OF_RANKS)} after --, got {name!r}")
    for place, option in enumerate(options):
        if option == "--plan" or option.startswith("--plan="):
            told = option.partition("=")[2] or "".join(options[place + 1 : place + 2])
            raise UsageError(f"launch: expected --plan before -- only, got --plan {told} after it too")

    from meshloom.parallel.launch import launched
    from meshloom.parallel.meet import Meeting

    again = ["meshloom", "launch", "--rank", "{rank}", "--plan", str(cut), "--port", str(port), "--"]
    shown = " ".join([*again, *(shlex.quote(word).replace("{", "{{").replace("}", "}}") for word in command_line)])
    meeting = Meeting(rank=rank, world_size=cut.world_size, port=port, timeout_s=timeout, command=shown)
    root: Any = context.find_root().command
    with launched(meeting):
        return root.main([name, *options, "--plan", str(cut)], prog_name="meshloom", standalone_mode=False)

"""`meshloom what-if`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import click
import msgspec

from meshloom.chakra.file import read_all
from meshloom.chakra.timeline import Timeline
from meshloom.cli.simulate import shares
from meshloom.errors import UsageError
from meshloom.hardware.cluster import load_cluster
from meshloom.hardware.device import load_device
from meshloom.simulate.change import Change
from meshloom.simulate.engine import simulate

_SCALES = ("network", "compute", "host", "device")


@click.command()
@click.argument("where", metavar="DIR")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
@click.option("--compute", type=click.Choice(["model", "measured"]), default="model", show_default=True,
              help="Where durations come from.")  # fmt: skip
@click.option("--scale", multiple=True, help="network=2x, compute=1.5x, host=2x, device=h200; may be repeated.")
@click.option("--remove-comm", multiple=True, help="An axis whose communication takes no time: tp, dp, pp, cp.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    where: str, cluster: str, compute: Any, scale: tuple[str, ...], remove_comm: tuple[str, ...], as_json: bool
) -> None:
    """Ask what a step would take with faster links, another device, or without some communication.

    \b
    Example:
      meshloom what-if runs/gpt2-tiny.dp2.20261121-120000 --scale network=2x --remove-comm dp
    """
    traces, on = read_all(where), load_cluster(cluster)
    wanted = Change(without=frozenset(remove_comm), device=on.device)
    for each in scale:
        name, factor = _scale(each)
        wanted = replace(wanted, **({"instead": load_device(factor)} if name == "device" else {name: float(factor)}))
    told = [f"{name} {factor}" for name, _, factor in (each.partition("=") for each in scale)]
    told += [f"no communication over {axis}" for axis in remove_comm]
    before = simulate(traces, on, durations=compute)
    after = simulate(traces, on, durations=compute, wanted=wanted)
    speedup = before.makespan_ns / max(1, after.makespan_ns)
    if as_json:
        shown = {"before_ns": before.makespan_ns, "after_ns": after.makespan_ns, "speedup": speedup}
        click.echo(msgspec.json.encode({**shown, "before": shares(before), "after": shares(after)}).decode())
        return
    times = "the recorded times" if compute == "measured" else on.name
    for name, timeline in ((f"with {times}", before), (f"with {', '.join(told) or 'nothing changed'}", after)):
        click.echo(f"{timeline.makespan_ns / 1e6:12,.3f} ms  {name}: {_where(timeline)}")
    click.echo(f"{speedup:.2f} times as fast")


def _where(timeline: Timeline) -> str:
    parts = shares(timeline)
    return (
        f"compute {parts['compute_share']:.1%}, exposed communication {parts['exposed_communication_share']:.1%}, "
        f"idle {parts['idle_share']:.1%}"
    )


def _scale(text: str) -> tuple[str, str]:
    name, _, factor = text.partition("=")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)x?", factor)
    if name not in _SCALES or not factor or (name != "device" and (number is None or float(number[1]) <= 0)):
        raise UsageError(
            f"--scale: expected one of {', '.join(_SCALES)} with a factor, such as network=2x, got {text!r}"
        )
    return name, factor if name == "device" or number is None else number[1]

"""Damages files at random for every reader, for as long as you say, and names each failure that is none of our errors.

    python benchmarks/fuzz.py --minutes 10                      # all readers take turns
    python benchmarks/fuzz.py --minutes 10 --only host,kineto

Memory is limited to 2 GB above what the program has when it begins, a file to ten seconds. With the package atheris
installed, and `--atheris READER`, coverage leads the way. A failure's file is kept in the folder of `--keep`.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_BYTES, LIMIT_S = 2_000_000_000, 10.0


class Hang(BaseException):
    """A file took too long."""


def limit_memory() -> None:
    """Let this process take at most 2 GB more than it has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT_BYTES, held + LIMIT_BYTES))


def attempt(reader: Any, folder: Path, data: bytes) -> str:
    """What went wrong and where; empty if the file was read or refused."""
    from meshloom.errors import MeshloomError

    path = reader.put(folder, data)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        reader.use(path)
    except MeshloomError:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "meshloom" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} in {where}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def main() -> None:
    """Print what was tried; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all readers together")
    parser.add_argument("--only", help="names of readers joined by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that made a reader fail")
    parser.add_argument("--atheris", metavar="READER", help="let atheris choose the damage to files of this reader")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.faults.readers import damaged, readers

    known = readers()
    unknown = [name for name in [*(options.only or "").split(","), options.atheris or ""] if name and name not in known]
    if unknown:
        parser.error(f"expected readers of {', '.join(known)}, got {unknown[0]}")
    chosen = options.only.split(",") if options.only else [*known]
    warnings.simplefilter("ignore")

    def hang(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    if options.atheris:
        with_atheris(known[options.atheris], options.minutes)
        return
    limit_memory()
    chance, failed, tried = random.Random(options.seed), Counter[tuple[str, str]](), Counter[str]()
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            for name in chosen:
                data = damaged(known[name].whole, chance)
                tried[name] += 1
                if trouble := attempt(known[name], Path(folder), data):
                    failed[name, trouble] += 1
                    if options.keep and failed[name, trouble] == 1:
                        options.keep.mkdir(parents=True, exist_ok=True)
                        (options.keep / f"{name}.{len(failed)}".replace(" ", "-")).write_bytes(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{sum(tried.values()):,} files for {len(tried)} readers, seed {options.seed}, peak {peak:.2f} GB")
    for (name, trouble), count in failed.most_common():
        print(f"{name}: {trouble}, {count} times")
    sys.exit(1 if failed else 0)


def with_atheris(reader: Any, minutes: float) -> None:
    """Let atheris look for failures; it ends the process itself at the first one."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "corpus").mkdir()
        (Path(folder) / "corpus" / "whole").write_bytes(reader.whole)

        def once(data: bytes) -> None:
            if trouble := attempt(reader, Path(folder), data):
                raise RuntimeError(trouble)

        atheris.instrument_all()
        limits = [f"-max_total_time={60 * minutes:.0f}", "-rss_limit_mb=2900", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, str(Path(folder) / "corpus")], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

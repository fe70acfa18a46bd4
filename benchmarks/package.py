"""Builds the wheel, installs it into a fresh environment without its dependencies, and runs the demo there.

    python benchmarks/package.py

Nothing is downloaded: the dependencies are those of the environment that runs this, which the fresh one looks into by
a .pth file after its own packages. What the wheel lacks (specs, presets, style sheets) is therefore missed.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "meshloom"


def shipped() -> set[str]:
    """The files of the package, as they must stand in the wheel."""
    return {
        str(path.relative_to(ROOT / "src"))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and "__pycache__" not in path.parts
    }


def check(wheel: Path) -> list[str]:
    """What is wrong with the wheel."""
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        facts = message_from_bytes(packed.read(next(name for name in names if name.endswith("/METADATA"))))
    wrong = [f"the wheel lacks {name}" for name in sorted(shipped() - names)]
    for key in ("Name", "Version", "Summary", "License-Expression", "Requires-Python", "Description-Content-Type"):
        if not facts[key]:
            wrong.append(f"the metadata lack {key}")
    return wrong


def run(*command: str, cwd: Path = ROOT) -> str:
    """The command's output; ends the program with it if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    """Print what was built and run; exit with a message if anything failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"))
        (wheel,) = (folder / "dist").glob("*.whl")
        (source,) = (folder / "dist").glob("*.tar.gz")
        if wrong := check(wheel):
            sys.exit("\n".join(wrong))
        venv.create(folder / "fresh", with_pip=True)
        python = str(folder / "fresh" / "bin" / "python")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel))
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        where = run(python, "-I", "-c", "import meshloom; print(meshloom.__file__)", cwd=folder).strip()
        if not Path(where).is_relative_to(site):
            sys.exit(f"expected the installed package, got {where}")
        command = str(folder / "fresh" / "bin" / "meshloom")
        told = run(python, "-I", command, "demo", "--out", str(folder / "run"), cwd=folder)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {source.name}: {source.stat().st_size:,} bytes")
        print("demo:", told.strip().splitlines()[-1])


if __name__ == "__main__":
    main()

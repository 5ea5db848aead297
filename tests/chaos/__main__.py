"""`python -m tests.chaos --seed 0 --runs 24 --kills 210`: plays the campaign, prints its figures.

Exit status 0 if every run holds exactly what it must, 1 on any violation; the folders of such runs stay for inspection.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import HEADER, SCENARIOS, campaign, explain, line, table


def main() -> int:
    """Parses the command line and plays."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="decides model, documents, and which fault happens where")
    parser.add_argument("--runs", type=int, default=24, help="runs in all; with 14 every scenario is played once")
    parser.add_argument("--kills", type=int, default=210, help="scheduled SIGKILLs in all")
    parser.add_argument("--only", choices=SCENARIOS, help="play one scenario only")
    parser.add_argument("--list", action="store_true", help="tell the scenarios")
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    arguments = parser.parse_args()
    if arguments.list:
        say("\n".join(f"{name:24}{explain(name)}" for name in SCENARIOS))
        return 0
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(HEADER)
    played = []
    for figures in campaign(folder.absolute(), seed=arguments.seed, runs=arguments.runs, kills=arguments.kills,
                            only=arguments.only):  # fmt: skip
        say(line(figures))
        played.append(figures)
    say("\n" + table(played))
    if any(figures.violations for figures in played):
        say(f"the runs are in {folder}")
        return 1
    if arguments.keep is None:
        shutil.rmtree(folder)
    return 0


def say(text: str) -> None:
    """Standard output, at once: a campaign takes minutes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

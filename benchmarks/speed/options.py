"""The words of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.speed.programs import ENGINE_FLAGS, PEERS
from benchmarks.speed.sequential import LOOPS
from benchmarks.speed.workloads import WORKLOADS


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The command line.

    Args:
        about: shown by ``--help``.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", choices=list(WORKLOADS))
    parser.add_argument(
        "--population",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="registered clients on W4's model, instead of a workload; may be repeated",
    )
    parser.add_argument("--cohort", type=int, default=1000, help="clients of a round with --population")
    parser.add_argument("--data", type=Path, help="folder that holds mnist/ and cifar10/")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME[,key=value]",
        help="fedsim's engine (auto); may be repeated",
    )
    for flag in ENGINE_FLAGS:
        parser.add_argument(f"--{flag}", help=f"[engine] {flag}, for every engine")
    parser.add_argument("--strategy", default="fedavg", choices=sorted(LOOPS))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="any key of fedsim's configuration; may be repeated",
    )
    parser.add_argument("--rounds", type=int, help="timed rounds of each program, beside the first")
    parser.add_argument("--turn", type=int, help="rounds in a row before another program works")
    parser.add_argument("--repeats", type=int, default=1, help="new processes for everything, so many times")
    parser.add_argument(
        "--seq-threads",
        default="1,2",
        metavar="N,N",
        help="thread settings of the sequential loop; the better one counts",
    )
    parser.add_argument("--peers", default="", metavar="NAME,NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="interpreter that a peer is installed in",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs that measure memory")
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    parser.add_argument("--plot", type=Path, help="picture of the medians, .svg or .png")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="trace of fedsim's first engine: .json for Chrome's format, else cProfile's",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="fail if a ratio is more than 15 %% below that in this JSON file",
    )
    parser.add_argument("--scratch", type=Path, help="where run folders and arrays go for the time being")
    return parser

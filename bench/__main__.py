"""python -m bench [op ...] [--threads 1,2] [--quick] [--results [FILE]] [--isa NAME]

Times every op against its peers and against the limits of this machine, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

import kvkernels  # noqa: F401  (loads the ops)
from bench import build, ops, report
from bench.limits import Limits
from bench.race import Result, timed


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def measure(names: list[str], threads: list[int], quick: bool, limits: Limits) -> list[Result]:
    found: list[Result] = []
    for name in names:
        mine: list[Result] = []
        say("", f"## {name}", *([report.NOTES[name]] if name in report.NOTES else []))
        for count in threads:
            for race, results in timed(ops.load(name).races(count, quick), limits, quick):
                say("", report.table(*report.rows(results), left=3) if results else race.label)
                mine += results
        warning = report.impossible(mine)
        if warning:
            say("", warning)
        found += mine
    return found


def page(results: list[Result], lines: list[str], command: str, isa: str) -> str:
    parts = [*report.header(command, isa), "", "```", *lines, "```"]
    for name in dict.fromkeys(r.op for r in results):
        mine = [r for r in results if r.op == name]
        parts += ["", f"## {name}", *([report.NOTES[name], ""] if name in report.NOTES else [""])]
        parts += [report.table(*report.rows(mine), left=3)]
        warning = report.impossible(mine)
        if warning:
            parts += ["", warning]
    return "\n".join(parts) + "\n"


def compare_isa(args: argparse.Namespace, names: list[str]) -> None:
    """Runs the same cases under the ISA asked for and under the best one, each in its own process."""
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa in (args.isa, ""):
            path = Path(folder) / f"{isa or 'best'}.json"
            command = [sys.executable, "-m", "bench", *names, "--threads", args.threads, "--json", str(path)]
            environment = {name: value for name, value in os.environ.items() if name != "KVKERNELS_ISA"}
            if isa:
                environment["KVKERNELS_ISA"] = isa
            done = subprocess.run(command + (["--quick"] if args.quick else []), env=environment)
            if done.returncode:
                raise SystemExit(done.returncode)
            data = json.loads(path.read_text())
            results[isa] = [Result(**r) for r in data["results"]]
            if not isa:
                best = data["isa"]
    fast = {(r.op, r.label, r.threads, r.name): r for r in results[""]}
    body = []
    for r in results[args.isa]:
        if not r.peer:
            other = fast[r.op, r.label, r.threads, r.name].seconds
            times = [report.duration(r.seconds), report.duration(other), f"{r.seconds / other:.2f}"]
            body.append([r.op, r.label, str(r.threads), r.name, *times])
    head = ["op", "case", "threads", "what", args.isa, best, f"{args.isa} / {best}"]
    say("", f"## {args.isa} against {best}", "", report.table(head, body, left=4))


def main() -> None:
    known = ops.names()
    every = torch.get_num_threads()
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ops against their peers and this machine.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of: {', '.join(known)} (all)")
    parser.add_argument("--threads", default="1" if every == 1 else f"1,{every}", help="counts, by comma (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds: does it run?")
    page_path = build.ROOT / "bench" / "results" / f"{'-'.join(build.cpu_name().lower().split())}.md"
    parser.add_argument("--results", type=Path, nargs="?", const=page_path, metavar="FILE",
                        help=f"write a page ({page_path.relative_to(build.ROOT)})")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--isa", help="compare this ISA with the best one")
    args = parser.parse_args()
    names = args.ops or known
    for name in names:
        if name not in known:
            parser.error(f'unknown op "{name}"; there are: {", ".join(known)}')
    if args.isa:
        return compare_isa(args, names)

    threads = [int(t) for t in args.threads.split(",")]
    isa = json.loads(torch.ops.kvkernels.build_info())["isa"]
    limits = Limits(isa)
    lines = []
    for count in threads:
        rates = [limits.sample(count) for _ in range(3 if args.quick else 7)]
        lines.append(report.limits_line(count, {key: max(r[key] for r in rates) for key in rates[0]}))
    command = " ".join(["python -m bench", *args.ops, "--threads", args.threads, *(["--quick"] if args.quick else [])])
    say(*report.header(command, isa)[:3], "", *lines)
    results = measure(names, threads, args.quick, limits)
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(page(results, lines, command, isa))
        say("", f"written: {args.results}")
    if args.json:
        args.json.write_text(json.dumps({"isa": isa, "results": [asdict(r) for r in results]}))
    warning = report.impossible(results)
    if warning:
        say("", warning)


if __name__ == "__main__":
    main()

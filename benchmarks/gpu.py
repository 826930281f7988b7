"""stagemesh beside vLLM on the same GPUs: every row of the table, by groups.

    python benchmarks/gpu.py --json --group A --vllm /tmp/vllm-site --bench-vllm bench_vllm.py --merge gpu.json

Groups: A one GPU, B two, C four, D the 70B shape on four. Ours is measured through router and gRPC by a client
in a process of its own; vLLM by the yardstick's own benchmark, with the same requests; each in an
environment of its own. A row's pair must come from one machine in one lease: run a group in one call, or
its runs (`--runs`) in calls that follow each other and `--merge` into one file.

Results are written as they come: DIR/NAME.jsonl for each run, and after each the merged rows. A run for which
the time budget has no room is left out, and its rows say so, as do those of groups that were not asked for.
Without a GPU nothing is run or written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkout import utc_now
from gpu_facts import Facts, read_facts
from gpu_rows import GROUPS, GPURow, Runs, rows_of_group
from gpu_runs import RunLog, RunOptions, carry_out
from gpu_specs import RunSpec, runs_of
from report import machine

Row = dict[str, Any]


def main() -> None:
    """Run what was asked for, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--group", default="A", metavar="A[,B...]")
    parser.add_argument("--runs", default="", metavar="NAME[,NAME...]", help="only these runs of the groups")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", help="take rows and runs from it; write all back"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--budget-s", type=float, default=560.0, help="start no run that ends later")
    parser.add_argument("--vllm", type=Path, help="folder of the unpacked yardstick")
    parser.add_argument("--bench-vllm", type=Path, help="the yardstick's bench_vllm.py")
    parser.add_argument("--quick", action="store_true", help="one repetition of each measurement")
    parser.add_argument("--dry-run", action="store_true", help="tiny shape, CPU stages, no vLLM")
    parser.add_argument("--list", action="store_true", help="name the runs of the groups and stop")
    parser.add_argument("--table", action="store_true", help="print the rows of --merge as Markdown and stop")
    parser.add_argument("--up", default="", metavar="OPTIONS", help="further options of `stagemesh up`")
    options = parser.parse_args()
    try:
        specs = runs_of(options.group, options.runs)
    except ValueError as error:
        parser.error(str(error))
    if options.table:
        print(_table(_read(options.merge)["results"]))
        return
    if options.list:
        for spec in specs:
            print(f"{spec.name:<16} {spec.num_gpus} GPUs, about {spec.estimate_s} s")
        return
    facts = read_facts()
    if not facts.gpus and not options.dry_run:
        sys.exit(
            "error: nvidia-smi -L lists no GPU here, so there is nothing to measure; --dry-run proves the scripts on CPU "
            "stages, --table --merge FILE shows what was measured elsewhere"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    run_options = RunOptions(
        out=options.out,
        vllm=options.vllm,
        bench_vllm=options.bench_vllm,
        dry_run=options.dry_run,
        quick=options.quick,
        mesh_options=tuple(shlex.split(options.up)),
    )
    merged = _read(options.merge)
    began = time.monotonic()
    for spec in specs:
        left = options.budget_s - (time.monotonic() - began)
        _run_one(spec, run_options, merged, facts, left)
        merged["results"] = _rows(merged)
        _write(merged, options)
    print(file=sys.stderr)
    for row in merged["results"]:
        print(_line(row), file=sys.stderr)
    if options.json:
        print(json.dumps({key: value for key, value in merged.items() if key != "runs"}, indent=1))


def _run_one(spec: RunSpec, options: RunOptions, merged: dict[str, Any], facts: Facts, left_s: float) -> None:
    gpus = len(facts.gpus)
    why = ""
    if not options.dry_run and gpus < spec.num_gpus:
        why = f"this machine has {gpus} GPUs, {spec.num_gpus} are needed"
    elif not options.dry_run and left_s < spec.estimate_s:
        why = f"about {spec.estimate_s} s are needed and {left_s:.0f} s were left"
    if why:
        print(f"{spec.name}: not run, {why}", file=sys.stderr)
        # What an earlier call measured stays.
        if spec.name not in merged["runs"]:
            merged["runs"][spec.name] = _run_entry(facts, "", [{"measure": "error", "what": why}])
        return
    print(f"{spec.name}: {spec.num_gpus} GPUs", file=sys.stderr, flush=True)
    log: RunLog = carry_out(spec, options)
    merged["runs"][spec.name] = _run_entry(facts, log.name, log.lines)


def _run_entry(facts: Facts, log_name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "utc": utc_now(),
        "commit": facts.commit,
        "gpus": list(facts.gpus),
        "log": log_name,
        "lines": lines,
    }


def _rows(merged: dict[str, Any]) -> list[Row]:
    """The rows of every group, in the order of the table; what was not run says so."""
    runs = Runs({name: entry["lines"] for name, entry in merged["runs"].items()})
    return [_finished(row, merged["runs"]) for group in GROUPS for row in rows_of_group(group, runs)]


def _finished(row: GPURow, entries: dict[str, Any]) -> Row:
    met = None
    if row.target is not None:
        met = row.value is not None and (row.value <= row.target if row.at_most else row.value >= row.target)
    found = [entries[name] for name in row.runs if name in entries]
    machines = {tuple(entry["gpus"]) for entry in found}
    reference = row.reference
    if row.value is not None and len(machines) > 1:
        reference += "; NOT one machine: its runs saw different GPUs"
    return {
        **asdict(row),
        "value": None if row.value is None else float(f"{row.value:.5g}"),
        "target": None if row.target is None else float(f"{row.target:.5g}"),
        "stretch": None if row.stretch is None else float(f"{row.stretch:.5g}"),
        "met": met,
        "reference": reference,
        "commit": found[0]["commit"] if found else "",
        "utc": found[0]["utc"] if found else "",
        "gpus": found[0]["gpus"] if found else [],
        "logs": [entry["log"] for entry in found if entry["log"]],
    }


def _read(path: Path | None) -> dict[str, Any]:
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"benchmark": "gpu", "machine": "", "command": "", "results": [], "runs": {}}


def _write(merged: dict[str, Any], options: argparse.Namespace) -> None:
    """The merged file, and a copy with all raw files in one archive, since few files may come back."""
    merged["machine"] = machine()
    merged["command"] = shlex.join(["python", *sys.argv])
    text = json.dumps(merged, indent=1)
    for path in {options.merge, options.out / "gpu.json"} - {None}:
        path.write_text(text)
    with tarfile.open(options.out / "raw.tar.gz", "w:gz") as archive:
        for path in sorted(options.out.glob("*.jsonl")) + sorted(options.out.glob("*.log")):
            archive.add(path, arcname=path.name)


def _table(rows: list[Row]) -> str:
    """For docs/performance.md."""
    lines = [
        "| group | row | measured | target | met | beside it |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:,g} {row['unit']}"
        target = "" if row["target"] is None else f"{'at most ' if row['at_most'] else ''}{row['target']:,g}"
        met = {True: "yes", False: "no", None: ""}[row["met"] if row["value"] is not None else None]
        lines.append(f"| {row['group']} | {row['name']} | {value} | {target} | {met} | {row['reference']} |")
    return "\n".join(lines)


def _line(row: Row) -> str:
    mark = {True: "met", False: "MISSED", None: ""}[row["met"]]
    target = "" if row["target"] is None else f"{'<=' if row['at_most'] else '>='} {row['target']:g}"
    figure = f"{row['group']} {row['name']:<54} {row['value']!s:>9} {row['unit']:<7} {target:<12} {mark:<7}"
    return f"{figure} {row['reference'][:150]}"


if __name__ == "__main__":
    main()

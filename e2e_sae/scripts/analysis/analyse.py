"""`e2e-sae analyse RUNS --out DIR`: the paper's figures and tables from anyone's runs."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from e2e_sae.errors import UserError
from e2e_sae.log import log_to_console
from e2e_sae.scripts.exit_codes import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all analyses share."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUNS", help="run folders, sweep folders, W&B runs (entity/project/id) or projects"
    )
    parser.add_argument("--paper", action="store_true", help="instead of RUNS: the paper's own, from W&B")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="DIR", help="default: ./analysis")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these runs")
    parser.add_argument("--n-samples", type=int, default=100, metavar="N", help="rows for activations (default 100)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")
    parser.add_argument("--device", default="auto", help="where models run (default: CUDA if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap, resampling and UMAP (default 0)")


def run(args: argparse.Namespace) -> None:
    """Makes the chosen analyses of the named runs."""
    from e2e_sae.analysis.items import all_analyses, chosen

    if args.list:
        width = max(map(len, all_analyses()))
        for analysis in all_analyses().values():
            print(f"{analysis.name:<{width}}  {analysis.about}")
        return
    analyses = chosen(args.only)
    for name in ("n_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if not args.runs and not args.paper:
        raise UserError("nothing to analyse: name run folders, a sweep folder, W&B runs or a W&B project")
    if args.runs and args.paper:
        raise UserError(f"--paper stands for the paper's runs: leave out {' '.join(args.runs)}")
    from e2e_sae.analysis.paper import FILE, PaperRuns, papers_table, published_colours
    from e2e_sae.analysis.produce import produce
    from e2e_sae.analysis.runs import only_where, runs_table
    from e2e_sae.analysis.study import Study

    paper = PaperRuns.from_file(FILE) if args.paper else None
    table = only_where(runs_table(args.runs) if paper is None else papers_table(paper), args.where)
    study = Study(
        table,
        args.out / "cache",
        n_samples=args.n_samples,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
        overrides=args.overrides,
    )
    with published_colours(paper) if paper is not None else nullcontext():
        produce(study, analyses, args.out)


def main(name: str) -> None:
    """Runs one analysis as a program of its own."""
    parser = argparse.ArgumentParser(prog=f"python -m e2e_sae.scripts.analysis.{name}")
    add_arguments(parser)
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(only=[name], list=False)
    args = parser.parse_args()
    log_to_console()
    sys.exit(run_command(lambda: run(args), debug=args.debug))

"""`e2e-sae analyse RUNS --out DIR`: the paper's figures and tables from anyone's runs."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from e2e_sae.errors import UserError
from e2e_sae.log import log_to_console
from e2e_sae.scripts.exit_codes import run_command
from e2e_sae.scripts.studies import add_study_arguments, check_at_least_1, study_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all analyses share."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUNS", help="run folders, sweep folders, W&B runs (entity/project/id) or projects"
    )
    parser.add_argument("--paper", action="store_true", help="instead of RUNS: the paper's own, from W&B")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="DIR", help="default: ./analysis")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these runs")
    add_study_arguments(parser, 100, "bootstrap, resampling and UMAP")


def run(args: argparse.Namespace) -> None:
    """Makes the chosen analyses of the named runs."""
    from e2e_sae.analysis.items import all_analyses, chosen

    if args.list:
        width = max(map(len, all_analyses()))
        for analysis in all_analyses().values():
            print(f"{analysis.name:<{width}}  {analysis.about}")
        return
    analyses = chosen(args.only)
    check_at_least_1(args, "n_samples", "batch_size")
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
    study = study_of(args, table, Study)
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

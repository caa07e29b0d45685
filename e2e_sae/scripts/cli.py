"""The `e2e-sae` command: parses arguments, calls the library, prints. `e2e-sae --help` lists the subcommands.

Nothing heavy is imported before the arguments are parsed, so that help and mistakes answer at once.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from e2e_sae import __version__
from e2e_sae.errors import UserError
from e2e_sae.log import log_to_console
from e2e_sae.scripts.analysis.analyse import add_arguments as add_analysis_arguments
from e2e_sae.scripts.analysis.analyse import run as run_analyses
from e2e_sae.scripts.exit_codes import run_command
from e2e_sae.scripts.interpret import add_arguments as add_interpretation_arguments
from e2e_sae.scripts.interpret import run as run_interpretation
from e2e_sae.scripts.pages import add_arguments as add_page_arguments
from e2e_sae.scripts.pages import run as run_pages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code (`exit_codes.py`)."""
    args = build_parser().parse_args(argv)
    log_to_console()
    return run_command(lambda: args.run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; each subcommand carries its function as `run`."""
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    overrides = argparse.ArgumentParser(add_help=False)
    overrides.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one setting, e.g. loss.sparsity.coeff=3 (may be repeated)",
    )
    parser = argparse.ArgumentParser(prog="e2e-sae", description="End-to-end sparse autoencoders for language models.")
    parser.add_argument("--version", action="version", version=f"e2e-sae {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", parents=[overrides, debug], help="train SAEs from a YAML config")
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (optional with --resume)")
    train.add_argument(
        "--resume",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="go on with an interrupted run; several: members that go on together",
    )
    train.set_defaults(run=_train)

    finetune = commands.add_parser(
        "finetune", parents=[overrides, debug], help="improve a trained SAE by a short training on KL + MSE"
    )
    finetune.add_argument("sae", metavar="SAE", help="run folder, checkpoint, .pt, SAELens folder, or W&B run")
    finetune.add_argument("--config", type=Path, metavar="YAML", help="settings over those of the SAE's own run")
    finetune.add_argument("--hold-l0", action="store_true", help="move the sparsity coefficient so that L0 stays")
    finetune.set_defaults(run=_finetune)

    evaluate = commands.add_parser(
        "evaluate", parents=[overrides, debug], help="evaluate a run folder on its held-out data"
    )
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with final_config.yaml")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the metrics to FILE as well")
    evaluate.set_defaults(run=_evaluate)

    demo = commands.add_parser(
        "demo", parents=[overrides, debug], help="train a local, an e2e and an e2e+ds SAE on the embedded model"
    )
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    demo.set_defaults(run=_demo)

    convert = commands.add_parser("convert", parents=[debug], help="write a run in another library's format")
    convert.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder or checkpoint of any known format")
    convert.add_argument("--to", choices=["legacy"], required=True, help="legacy: the paper's library")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    convert.set_defaults(run=_convert)

    sweep = commands.add_parser("sweep", parents=[overrides, debug], help="run W&B sweep files here, without W&B")
    sweep.add_argument("files", nargs="+", type=Path, metavar="SWEEP", help="YAML as for `wandb sweep`")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="default: ./out/sweeps/<names of the files>")
    sweep.add_argument("--count", type=int, metavar="N", help="runs of each sweep at most")
    sweep.add_argument(
        "--shared",
        type=int,
        nargs="?",
        const=0,
        metavar="K",
        help="train runs that differ only in SAEs, loss, seed or learning rate over one clean pass, K together at most",
    )
    sweep.set_defaults(run=_sweep)

    analyse = commands.add_parser(
        "analyse", parents=[overrides, debug], help="the paper's figures and tables, from finished runs"
    )
    add_analysis_arguments(analyse)
    analyse.add_argument("--only", action="append", default=[], metavar="NAME", help="one analysis (may be repeated)")
    analyse.add_argument("--list", action="store_true", help="list the analyses")
    analyse.set_defaults(run=run_analyses)

    interpret = commands.add_parser(
        "interpret", parents=[overrides, debug], help="explain latents in words, and score the words"
    )
    add_interpretation_arguments(interpret)
    interpret.set_defaults(run=run_interpretation)

    pages = commands.add_parser("pages", parents=[overrides, debug], help="a page for each latent, for the browser")
    add_page_arguments(pages)
    pages.set_defaults(run=run_pages)

    # A program of its own, whose options are not known here: no prefix of options is recognised.
    bench = commands.add_parser(
        "bench", prefix_chars="\0", add_help=False, help="speed and memory beside the plain way (`bench --help`)"
    )
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=_bench, debug=False)

    new_config = commands.add_parser("new-config", parents=[debug], help="write a commented minimal config for a model")
    new_config.add_argument("model", metavar="NAME_OR_FOLDER", help="hub name or Hugging Face folder")
    new_config.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: standard output")
    new_config.add_argument("--paper", action="store_true", help="the paper's SAE and loss (ReLU, e2e+ds)")
    new_config.set_defaults(run=_new_config)
    return parser


def _train(args: argparse.Namespace) -> None:
    if args.config is None and args.resume is None:
        raise UserError("nothing to train: expected a CONFIG file, or --resume RUN_DIR")
    from e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes import main as train_main

    config, resume = args.config, args.resume
    if config is None and len(resume) > 1 and resume[-1].is_file():
        *resume, config = resume  # `--resume RUN_DIR CONFIG`
    train_main(config, overrides=args.overrides, resume=resume)


def _finetune(args: argparse.Namespace) -> None:
    from e2e_sae.finetune import finetune

    finetune(args.sae, args.config, args.overrides, hold_l0=args.hold_l0)


def _evaluate(args: argparse.Namespace) -> None:
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"cannot write '{args.json}': the folder '{args.json.parent}' does not exist")
    if args.json is not None and args.json.is_dir():
        raise UserError(f"cannot write '{args.json}': it is a folder, name a file in it")
    from e2e_sae.evaluate_run import evaluate_run_dir

    metrics = evaluate_run_dir(args.run_dir, overrides=args.overrides)
    width = max(map(len, metrics), default=0)
    for key, value in metrics.items():
        print(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
    if args.json is not None:
        # As in metrics.jsonl, what is not finite is null: JSON has no NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        args.json.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")


def _demo(args: argparse.Namespace) -> None:
    from e2e_sae.demo import run_demo

    run_demo(args.out, overrides=args.overrides)


def _convert(args: argparse.Namespace) -> None:
    from e2e_sae.convert import convert_to_legacy

    folder = convert_to_legacy(args.run_dir, args.out)
    print(f"wrote {', '.join(sorted(file.name for file in folder.iterdir()))} to {folder}")


def _sweep(args: argparse.Namespace) -> None:
    from e2e_sae.sweeps.run import run_sweeps

    run_sweeps(args.files, out=args.out, jobs=args.jobs, overrides=args.overrides, count=args.count, shared=args.shared)


def _bench(args: argparse.Namespace) -> None:
    from e2e_sae.bench import bench

    sys.exit(bench(args.arguments))  # it has told what went wrong


def _new_config(args: argparse.Namespace) -> None:
    from e2e_sae.new_config import write_new_config

    text = write_new_config(args.model, args.out, papers=args.paper)
    print(f"wrote {args.out}; next: e2e-sae train {args.out}" if args.out is not None else text, end="")
    if args.out is not None:
        print()


if __name__ == "__main__":
    sys.exit(main())

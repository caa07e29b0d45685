"""The benchmarks' command line.

CASE ...               ours beside the plain twin, or several members beside one, as a table
growth [SERIES ...]    how cost grows with latents, vocabulary, context, layer, members
figure FILE            draws the figure of a JSON file that `growth` wrote
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from e2e_sae.base_config import apply_overrides
from e2e_sae.errors import UserError, did_you_mean
from e2e_sae.log import log_to_console
from e2e_sae.models.lm import resolve_device
from e2e_sae.scripts.exit_codes import run_command

from .cases import CASES, CORE, choose
from .figure import draw
from .growth import SERIES, grow
from .measure import Settings, measure
from .results import Results
from .shapes import SMALL, Shape, with_model
from .table import HEAD, line_of


def main(argv: Sequence[str], prog: str = "python -m benchmarks") -> int:
    """Runs the command and returns its exit code."""
    args = build_parser(prog).parse_args(argv)
    log_to_console(logging.WARNING)
    return run_command(lambda: run(args), debug=args.debug)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="CASE", help=f"name or pattern; default: {' '.join(CORE)}")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE, after each case")
    parser.add_argument("--memory", action="store_true", help="also peak memory, each in a process of its own")
    parser.add_argument("--rounds", type=_positive, default=7, metavar="N", help="timings of each step (default: 7)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="steps of a timing (default: 1, on a GPU 10)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of torch (default: its own choice)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="measure with this model (GPT-2 or Llama style)")
    parser.add_argument("--context", type=_positive, metavar="N", help="tokens of a row, instead of the case's")
    parser.add_argument("--rows", type=_positive, metavar="N", help="rows of a step, instead of the case's")
    parser.add_argument("--twin-rows", type=int, metavar="N", help="rows of the twin's steps; 0: no twin")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of our runs, e.g. autocast=bfloat16, tf32=true, compile=true (may be repeated)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> None:
    """Does what the arguments say."""
    if args.list:
        for name in CASES:
            print(f"{name}{'  (default)' if name in CORE else ''}")
        return
    command, *rest = args.what or [""]
    if command == "figure":
        if len(rest) != 1:
            raise UserError("figure needs one FILE: the JSON that `growth --json FILE` wrote")
        target = Path(rest[0]).with_suffix(".png")
        draw(Path(rest[0]), target)
        print(f"wrote {target}")
        return
    settings = _settings(args)
    results = Results(settings, args.json)
    if command == "growth":
        unknown = [name for name in rest if name not in SERIES]
        if args.model is not None:
            raise UserError("growth makes its models, of many sizes: leave --model out")
        if unknown:
            raise UserError(f"no series is called '{unknown[0]}'.{did_you_mean(unknown[0], list(SERIES))}")
        entries = grow(rest or list(SERIES), settings, _changed(SMALL, args))
    else:
        chosen = {name: case._replace(shape=_changed(case.shape, args)) for name, case in choose(args.what).items()}
        entries = ({"case": name, **measure(case, settings)} for name, case in chosen.items())
    print(HEAD)
    for entry in entries:
        results.add(entry)
        print(line_of(entry), flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)


def _settings(args: argparse.Namespace) -> Settings:
    device = str(resolve_device(args.device))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"cannot write '{args.json}': the folder '{args.json.parent}' does not exist")
    apply_overrides({}, args.overrides)  # says what is wrong with them before anything is measured
    return Settings(
        device=device,
        n_rounds=args.rounds,
        n_steps=args.steps or (10 if device.startswith("cuda") else 1),
        overrides=tuple(args.overrides),
        twin_rows=args.twin_rows,
        with_memory=args.memory,
    )


def _changed(shape: Shape, args: argparse.Namespace) -> Shape:
    """Returns the shape with what the command line changes."""
    shape = shape._replace(n_ctx=args.context or shape.n_ctx, batch_size=args.rows or shape.batch_size)
    return shape if args.model is None else with_model(shape, args.model)

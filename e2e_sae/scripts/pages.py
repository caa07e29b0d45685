"""`e2e-sae pages RUN --out DIR`: a page for each latent, to look at in a browser."""

import argparse
import re
from pathlib import Path

from e2e_sae.errors import UserError
from e2e_sae.scripts.studies import add_study_arguments, check_at_least_1, study_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its arguments."""
    parser.add_argument("sae", metavar="RUN", help="run folder, checkpoint, .pt, SAELens folder, or W&B run")
    parser.add_argument("--other", metavar="RUN2", help="an SAE to compare with: it gets pages too")
    parser.add_argument("--out", type=Path, default=Path("pages"), metavar="DIR", help="new folder; default: ./pages")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--latents", metavar="1,2,3", help="pages for these latents, and those of RUN2 nearest to them")
    which.add_argument("--top", type=int, metavar="N", help="pages for the N with the largest sums of activations")
    add_study_arguments(parser, 1000, "the contexts that are drawn")


def run(args: argparse.Namespace) -> None:
    """Makes the pages."""
    check_at_least_1(args, "n_samples", "batch_size", "top")
    if args.latents is not None and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", args.latents) is None:
        raise UserError(f"--latents is '{args.latents}', expected numbers with commas between them, such as 1,2,3")
    import pandas as pd

    from e2e_sae.analysis.feature_pages import PageStudy, make_pages

    sources = [args.sae] if args.other is None else [args.sae, args.other]
    study = study_of(args, pd.DataFrame({"id": ["A", "B"][: len(sources)], "source": sources}), PageStudy)
    latents = None if args.latents is None else [int(latent) for latent in args.latents.split(",")]
    make_pages(study, args.out, latents, args.top)

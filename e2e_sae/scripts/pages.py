"""`e2e-sae pages RUN --out DIR`: a page for each latent, to look at in a browser."""

import argparse
import re
from pathlib import Path

from e2e_sae.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its arguments."""
    parser.add_argument("sae", metavar="RUN", help="run folder, checkpoint, .pt, SAELens folder, or W&B run")
    parser.add_argument("--other", metavar="RUN2", help="an SAE to compare with: it gets pages too")
    parser.add_argument("--out", type=Path, default=Path("pages"), metavar="DIR", help="new folder; default: ./pages")
    parser.add_argument("--n-samples", type=int, default=1000, metavar="N", help="rows of data (default 1000)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--latents", metavar="1,2,3", help="pages for these latents, and those of RUN2 nearest to them")
    which.add_argument("--top", type=int, metavar="N", help="pages for the N with the largest sums of activations")
    parser.add_argument("--device", default="auto", help="where models run (default: CUDA if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of the contexts that are drawn (default 0)")


def run(args: argparse.Namespace) -> None:
    """Makes the pages."""
    for name in ("n_samples", "batch_size", "top"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if args.latents is not None and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", args.latents) is None:
        raise UserError(f"--latents is '{args.latents}', expected numbers with commas between them, such as 1,2,3")
    import pandas as pd

    from e2e_sae.analysis.feature_pages import PageStudy, make_pages

    sources = [args.sae] if args.other is None else [args.sae, args.other]
    study = PageStudy(
        pd.DataFrame({"id": ["A", "B"][: len(sources)], "source": sources}),
        args.out / "cache",
        n_samples=args.n_samples,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
        overrides=args.overrides,
    )
    latents = None if args.latents is None else [int(latent) for latent in args.latents.split(",")]
    make_pages(study, args.out, latents, args.top)

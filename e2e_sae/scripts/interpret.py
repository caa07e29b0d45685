"""`e2e-sae interpret RUN [RUN2 ...] --out DIR`: explains latents in words, and scores the words."""

import argparse
import json
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.scripts.studies import add_study_arguments, check_at_least_1, study_of

if TYPE_CHECKING:
    from e2e_sae.analysis.interpret.run import Online, Prices

_SCORERS = ("detection", "fuzzing", "simulation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, sweep folders or W&B runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these runs")
    parser.add_argument(
        "--latents", default="100", metavar="N|A,B,...", help="how many, drawn at random (default 100), or which"
    )
    parser.add_argument("--offline", action="store_true", help="token statistics instead of language models")
    models = parser.add_argument_group("language models (OPENAI_BASE_URL and OPENAI_API_KEY, or .env)")
    models.add_argument("--explainer-model", metavar="NAME", help="what explains")
    models.add_argument("--scorer-model", metavar="NAME", help="what scores (default: the explainer)")
    models.add_argument("--scorers", nargs="+", choices=_SCORERS, help="default: all three")
    models.add_argument(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="of each request, e.g. temperature=0"
    )
    models.add_argument("--yes", action="store_true", help="send the requests without asking")
    models.add_argument(
        "--price-in", type=float, nargs="+", metavar="DOLLARS", help="per million tokens (explainer's, scorer's)"
    )
    models.add_argument("--price-out", type=float, nargs="+", metavar="DOLLARS", help="likewise, of answers")
    models.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    models.add_argument("--max-per-minute", type=float, metavar="N", help="requests sent (default: no limit)")
    data = parser.add_argument_group("examples")
    data.add_argument("--n-top", type=int, default=10, metavar="N", help="contexts to explain from (default 10)")
    data.add_argument(
        "--n-held-out", type=int, default=20, metavar="N", help="active and silent contexts to score on (default 20)"
    )
    data.add_argument("--n-context", type=int, default=32, metavar="N", help="tokens in a context (default 32)")
    add_study_arguments(data, 1000, "latents, contexts and bootstrap")


def run(args: argparse.Namespace) -> None:
    """Interprets latents of the named runs."""
    check_at_least_1(args, "n_samples", "n_top", "n_held_out", "n_context", "batch_size", "concurrency")
    latents = _latents(args.latents)
    online = None if args.offline else _online(args)
    if args.offline:
        _check_offline(args)
    from e2e_sae.analysis.interpret.examples import Wanted
    from e2e_sae.analysis.interpret.run import interpret
    from e2e_sae.analysis.runs import only_where, runs_table
    from e2e_sae.analysis.study import Study

    study = study_of(args, only_where(runs_table(args.runs), args.where), Study)
    wanted = Wanted(latents, args.n_top, args.n_held_out, args.n_context)
    with nullcontext() if online is None else closing(online.endpoint):
        files = interpret(study, wanted, args.out, online)
    if files:
        print(f"wrote {', '.join(file.name for file in files)} to {args.out}")


def _latents(text: str) -> int | tuple[int, ...]:
    """Returns a number of latents, or which; `7,` is the latent 7 alone."""
    parts = [part.strip() for part in text.split(",")]
    numbers = parts if parts[-1] else parts[:-1]
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--latents '{text}' is neither a number of latents (100) nor a list of them (3,17,29)")
    if len(parts) > 1:
        return tuple(int(number) for number in numbers)
    if int(text) < 1:
        raise UserError(f"--latents is {text}, expected at least 1")
    return int(text)


def _check_offline(args: argparse.Namespace) -> None:
    for name in ("explainer_model", "scorer_model", "scorers", "price_in", "price_out", "max_per_minute"):
        if getattr(args, name) is not None:
            raise UserError(f"--offline asks no language model: drop --{name.replace('_', '-')}")


def _online(args: argparse.Namespace) -> "Online":
    from e2e_sae.analysis.interpret.client import Endpoint
    from e2e_sae.analysis.interpret.judge import Judge
    from e2e_sae.analysis.interpret.run import Online
    from e2e_sae.settings import load_env_file

    if args.explainer_model is None:
        raise UserError("name a language model with --explainer-model, or use --offline, which needs none")
    if args.max_per_minute is not None and args.max_per_minute <= 0:
        raise UserError(f"--max-per-minute is {args.max_per_minute:g}, expected more than 0")
    load_env_file()
    scorers = tuple(scorer for scorer in _SCORERS if scorer in (args.scorers or _SCORERS))
    judge = Judge(
        explainer=args.explainer_model,
        scorer=args.scorer_model or args.explainer_model,
        scorers=scorers,
        parameters=_parameters(args.param),
        seed=args.seed,
    )
    return Online(
        judge=judge,
        endpoint=Endpoint.from_environment(args.max_per_minute),
        concurrency=args.concurrency,
        prices=_prices(args, judge.explainer, judge.scorer),
        confirm=lambda: args.yes or _confirmed(),
    )


def _parameters(pairs: list[str]) -> dict[str, Any]:
    """Returns the API's parameters; values are JSON, or else text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not key or not equals:
            raise UserError(f"--param '{pair}' is malformed: expected KEY=VALUE, e.g. temperature=0")
        if key in ("model", "messages", "stream", "n"):
            raise UserError(f"--param cannot set '{key}'")
        try:
            parameters[key] = json.loads(value)
        except ValueError:
            parameters[key] = value
    return parameters


def _prices(args: argparse.Namespace, explainer: str, scorer: str) -> "dict[str, Prices] | None":
    from e2e_sae.analysis.interpret.run import Prices

    given = args.price_in, args.price_out
    if given == (None, None):
        return None
    if None in given or any(len(prices) > 2 for prices in given):
        raise UserError("give both --price-in and --price-out, each one price, or the explainer's and the scorer's")
    price_in, price_out = given
    return {scorer: Prices(price_in[-1], price_out[-1]), explainer: Prices(price_in[0], price_out[0])}


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to confirm these requests at: add --yes to send them")
    logger.info("send them? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")

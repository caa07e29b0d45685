"""Makes a data set of token rows from text, and saves it or uploads it to the Hugging Face hub.

    python e2e_sae/scripts/upload_hf_dataset.py Skylion007/openwebtext --tokenizer gpt2 --n-ctx 1024 --out owt_gpt2
    python e2e_sae/scripts/upload_hf_dataset.py texts/ --tokenizer gpt2 --push me/texts-tokenizer-gpt2 --private

What is saved is read as `dataset_name: owt_gpt2`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from e2e_sae.errors import UserError
from e2e_sae.log import log_to_console
from e2e_sae.scripts.exit_codes import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = _parser().parse_args(argv)
    log_to_console()
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.out is None and args.push is None:
        raise UserError("nothing to do: expected --out DIR, --push, or both")
    from e2e_sae.data.dataset_config import DatasetConfig
    from e2e_sae.token_dataset import default_repo_id, hub_user, push_token_dataset, write_token_dataset

    keys = ("dataset_name", "tokenizer_name", "n_ctx", "split", "name", "revision", "data_files", "add_bos", "seed")
    values = {key: getattr(args, key) for key in keys} | {"is_tokenized": False}
    config = DatasetConfig.from_dict(values | ({"column_name": args.column} if args.column else {}))
    # Asked now, not after hours of tokenising.
    user = None if args.push is None else hub_user()
    repo_id = None if user is None else args.push or default_repo_id(config, user)
    with TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary) / "rows"
        n_rows = write_token_dataset(config, folder)
        if args.out is not None:
            print(f"wrote {n_rows} rows; use them as  dataset_name: {folder}, n_ctx: {args.n_ctx}")
        if repo_id is not None:
            print(f"pushed {n_rows} rows to {push_token_dataset(folder, repo_id, args.split, args.private)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokenise a text data set into rows, save it or upload it.")
    add = parser.add_argument
    add("dataset_name", metavar="TEXT", help="local file or folder, stdlib, or a data set on the hub")
    add("--tokenizer", dest="tokenizer_name", metavar="NAME", required=True, help="hub name or local folder")
    add("--n-ctx", type=int, default=1024, metavar="N", help="tokens in a row (default: %(default)s)")
    add("--split", default="train", help="split of the hub data set (default: %(default)s)")
    add("--column", help="column with the text (default: text)")
    add("--name", help="configuration of the hub data set")
    add("--revision", help="git revision of the hub data set")
    add("--data-files", nargs="+", metavar="PATTERN", help="files inside the hub data set or local folder")
    add("--add-bos", action="store_true", help="begin every row with the tokenizer's BOS")
    add("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="new folder for parquet files")
    add("--push", nargs="?", const="", metavar="OWNER/NAME", help="upload; default name: USER/TEXT-tokenizer-NAME")
    add("--private", action="store_true", help="make the uploaded data set private")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())

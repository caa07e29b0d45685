"""The embedded corpus: the standard library of the running Python as documents, without any download.

Real code and real English (documentation strings, comments) that every machine with Python has. One
module is one document. The split is a property of the module's name alone: a model trained on one Python
version's `train` part has not seen another version's `eval` modules.
Tests, installed packages and files generated for one machine are left out.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

CorpusPart = Literal["train", "eval", "all"]

_EVAL_ONE_IN = 20
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}
)
# Written by the build with this machine's compiler flags and paths.
_GENERATED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


class Document(NamedTuple):
    """One text of a corpus."""

    name: str
    """What the text is called: a dotted module name here."""
    text: str
    """The whole text, newlines as `\\n`."""


def stdlib_documents(part: CorpusPart = "all", root: Path | None = None) -> list[Document]:
    """Returns the modules of the standard library, sorted by dotted name.

    Args:
        part: `eval` is about one module in twenty, `train` the others, `all` both.
        root: folder of the library; None: that of the running interpreter.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    modules = sorted(_modules(folder))
    wanted = [(name, path) for name, path in modules if part in ("all", stdlib_part(name))]
    texts = ((name, path.read_text(encoding="utf-8", errors="replace")) for name, path in wanted)
    return [Document(name, text) for name, text in texts if text.strip()]


def stdlib_part(module: str) -> Literal["train", "eval"]:
    """Returns the part a module belongs to: `eval` iff sha256(name) mod 20 is 0.

    Only the name decides, so that the part is the same in every Python version.
    """
    digest = hashlib.sha256(module.encode()).digest()
    return "eval" if int.from_bytes(digest[:8], "big") % _EVAL_ONE_IN == 0 else "train"


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if not names or _SKIPPED_FOLDERS.intersection(parts[:-1]):
            continue
        # `config-3.11-x86_64-linux-gnu/python-config.py` and the like are no modules.
        if all(part.isidentifier() for part in parts) and not names[-1].startswith(_GENERATED_PREFIXES):
            yield ".".join(names), path

"""Which TransformerLens is installed, which of its two model classes is wanted, and keeping it quiet."""

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from e2e_sae.errors import UserError
from e2e_sae.models.lm_config import ModelClass


class HookedClasses(NamedTuple):
    """TransformerLens 3's model class and the class of its config."""

    model: Any
    """`HookedTransformer`."""
    config: Any
    """`HookedTransformerConfig`."""


def tlens_version() -> str:
    """Returns the version of the installed TransformerLens."""
    return importlib.metadata.version("transformer-lens")


def has_hooked_transformer() -> bool:
    """Returns whether the installed TransformerLens still has `HookedTransformer` (3.x)."""
    return int(tlens_version().split(".")[0]) < 4


def resolve_model_class(wanted: ModelClass) -> Literal["hooked", "bridge"]:
    """Returns the class to load: `auto` is `hooked` on TransformerLens 3 and `bridge` on 4.

    Raises:
        UserError: `hooked` on TransformerLens 4, which has removed it.
    """
    if wanted == "hooked" and not has_hooked_transformer():
        raise UserError(
            f"tlens_model_class 'hooked' needs TransformerLens 3, and {tlens_version()} is installed:"
            " pip install \"transformer-lens<4\", or choose 'bridge' or 'auto'"
        )
    if wanted == "auto":
        return "hooked" if has_hooked_transformer() else "bridge"
    return wanted


def hooked_classes() -> HookedClasses:
    """Returns TransformerLens 3's classes (imported here: 4.x has no such names)."""
    import transformer_lens

    package: Any = transformer_lens
    return HookedClasses(package.HookedTransformer, package.HookedTransformerConfig)


@contextlib.contextmanager
def quietly(keep_progress: bool = False) -> Iterator[None]:
    """Silences what TransformerLens and transformers print, warn and log while a model is loaded.

    Args:
        keep_progress: leave the progress bars on, for downloads.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        _quiet_root_logger(stack)
        for name in ("transformer_lens", "transformers"):
            library = logging.getLogger(name)
            stack.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        # Imported under the filter: the import itself warns.
        from transformers.utils import logging as hf_logging

        if not keep_progress and hf_logging.is_progress_bar_enabled():
            stack.callback(hf_logging.enable_progress_bar)
            hf_logging.disable_progress_bar()
        yield


def _quiet_root_logger(stack: contextlib.ExitStack) -> None:
    """Drops warnings logged through the root logger, as TransformerLens does; other loggers go on."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logging.root.addFilter(is_error)
    stack.callback(logging.root.removeFilter, is_error)
    # Without any handler, the first `logging.warning` of a library would install one on stderr for good.
    placeholder = logging.NullHandler()
    logging.root.addHandler(placeholder)
    stack.callback(logging.root.removeHandler, placeholder)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message with a full stop; the class name if it has none."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text if len(text) <= 300 else text[:300] + " ..."
    return text if text.endswith((".", "!", "?")) else text + "."

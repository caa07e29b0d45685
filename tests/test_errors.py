"""Error classes and spelling hints."""

import signal
from pathlib import Path

import pytest

from e2e_sae.errors import (
    CheckpointError,
    Interrupted,
    MissingFileError,
    RunFailed,
    UserError,
    did_you_mean,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (UserError, ValueError),
        (MissingFileError, FileNotFoundError),
        (MissingFileError, UserError),
        (CheckpointError, UserError),
        (RunFailed, RuntimeError),
    ],
)
def test_errors_are_what_python_code_expects_to_catch(error: type[Exception], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="the message"):
        raise error("the message")


def test_missing_file_error_shows_its_sentence_and_nothing_else() -> None:
    assert str(MissingFileError("config 'a.yaml' does not exist")) == "config 'a.yaml' does not exist"


def test_interrupted_names_the_signal_and_how_to_go_on() -> None:
    error = Interrupted(signal.SIGTERM, Path("out/run"))
    assert error.signum == signal.SIGTERM
    assert str(error) == "interrupted by SIGTERM; go on with: e2e-sae train --resume out/run"
    assert str(Interrupted(signal.SIGINT)) == "interrupted by SIGINT"


def test_nearest_puts_the_best_spelling_first() -> None:
    assert nearest("batchsize", ["lr", "effective_batch_size", "batch_size"])[0] == "batch_size"


def test_nearest_falls_back_to_names_that_contain_it() -> None:
    assert nearest("lr", ["warmup", "lr_schedule_of_the_run"]) == ["lr_schedule_of_the_run"]


def test_nearest_of_something_unlike_everything_is_empty() -> None:
    assert nearest("zzz", ["lr", "seed"]) == []
    assert did_you_mean("zzz", ["lr", "seed"]) == ""


def test_did_you_mean_joins_the_candidates() -> None:
    assert did_you_mean("blocks.1.hook_resid", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"]) == (
        " Did you mean 'blocks.1.hook_resid_pre' or 'blocks.1.hook_resid_mid'?"
    )

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from e2e_sae.acts import Mean, Pass, Position, TokenBatch
from e2e_sae.checkpoint.files import read_tensors
from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint, read_checkpoint_info
from e2e_sae.config import Config
from e2e_sae.data.batches import RowOrder, StreamedBatches
from e2e_sae.errors import RunFailed, UserError
from e2e_sae.losses import OutToInLoss
from e2e_sae.models.runner import run_clean
from e2e_sae.scripts.cli import main
from e2e_sae.setup import set_up
from e2e_sae.train import Trainer, train
from tests.tiny_models import random_tokens
from tests.tiny_runs import (
    E2E,
    E2E_DS,
    N_CTX,
    assert_same,
    console,
    files_in,
    lines_of,
    run_config,
    run_values,
    weights,
    write_rows,
)

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.parquet", 20)


# --- accumulation ---


@pytest.mark.parametrize("excluded", [[], list(range(25))], ids=["all tokens", "half of the tokens excluded"])
def test_two_batches_a_step_give_the_weights_of_one_batch_of_twice_the_size(
    tmp_path: Path, model: Path, rows: Path, excluded: list[int]
) -> None:
    if excluded:
        counted = (random_tokens(20, N_CTX) >= 25).sum(1)
        assert not torch.equal(counted[0:20:2], counted[1:20:2]), "rows must differ in counted tokens"
    values: dict[str, Any] = {
        "loss": E2E_DS,
        "dtype": "float64",
        "n_samples": 12,
        "train_data": {"exclude_token_ids": excluded, "shuffle": False},
    }
    whole = train(run_config(model, rows, tmp_path, batch_size=4, **values))
    parts = train(run_config(model, rows, tmp_path, batch_size=2, effective_batch_size=4, **values))
    for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    norms = [line["grad_norm"] for line in lines_of(whole)]
    assert [line["grad_norm"] for line in lines_of(parts) if "grad_norm" in line] == pytest.approx(norms, rel=1e-9)


def test_a_trailing_partial_group_is_dropped_and_a_line_says_so(tmp_path: Path, model: Path, rows: Path) -> None:
    values: dict[str, Any] = {"effective_batch_size": 6, "train_data": {"shuffle": False}}
    with console() as said:
        run = train(run_config(model, rows, tmp_path, **values))
    # 20 rows are 10 batches: 3 steps of 3 batches, and one batch left over.
    assert lines_of(run)[-1]["samples"] == 18
    assert [line for line in said if "dropped" in line] == [
        "the last 1 of 10 batches make no whole optimizer step of 3 batches: dropped"
    ]
    assert_same(weights(run), weights(train(run_config(model, rows, tmp_path, **values, n_samples=18))))


def test_a_save_due_inside_a_group_happens_after_its_step(tmp_path: Path, model: Path, rows: Path) -> None:
    # A flat learning rate, so that the run of one step makes the same step.
    values: dict[str, Any] = {"effective_batch_size": 8, "save_every_n_samples": 2, "lr_schedule": "linear"}
    short, long = (train(run_config(model, rows, tmp_path, n_samples=n, **values)) for n in (8, 16))
    assert long is not None
    assert [read_checkpoint(path).n_samples for path in RunDir(long).checkpoints()] == [16, 8]
    assert_same(weights(long / "samples_8"), weights(short))


# --- the log ---


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> list[dict[str, Any]]:
    """The log of 10 batches of 2 in 5 steps; evaluations are due at the first batch, then every 6 samples."""
    folder = tmp_path_factory.mktemp("logged")
    values: dict[str, Any] = {
        "loss": E2E,
        "effective_batch_size": 4,
        "log_every_n_grad_steps": 2,
        "eval_every_n_samples": 6,
        "eval_data": {"dataset_name": str(write_rows(folder / "eval.parquet", 4, seed=1)), "n_ctx": N_CTX},
        "warmup_samples": 8,
        "max_grad_norm": 1e-3,
        "train_data": {"shuffle": False},
    }
    return lines_of(train(run_config(tiny_folder("gpt2"), write_rows(folder / "t.parquet", 20), folder, **values)))


def test_lines_come_at_the_first_batch_every_second_step_each_evaluation_and_the_last_batch(
    logged: list[dict[str, Any]],
) -> None:
    assert [line["samples"] for line in logged] == [2, 8, 14, 16, 20]
    assert [line["grad_updates"] for line in logged] == [0, 2, 3, 4, 5]
    assert [line["total_tokens"] for line in logged] == [n * N_CTX for n in (2, 8, 14, 16, 20)]


def test_evaluations_join_the_line_of_their_batch(logged: list[dict[str, Any]]) -> None:
    assert [line["samples"] for line in logged if "performance/eval/ce_increase" in line] == [2, 8, 14, 20]
    hist = f"sparsity/eval/dict_el_frequency_hist/log10/{A}"
    assert [sum(line[hist]["counts"]) for line in logged if hist in line] == [32] * 4


def test_the_lr_is_the_one_used_at_that_batch(logged: list[dict[str, Any]]) -> None:
    # Two steps of warm-up of five: 0, 1/2, then 0.1 + 0.9 (1 + cos(pi k/3)) / 2 for k = 0, 1, 2.
    factors = [0.0, 0.5, 1.0, 0.1 + 0.45 * 1.5, 0.1 + 0.45 * 0.5]
    steps = [0, 1, 3, 3, 4]
    assert [line["lr"] for line in logged] == pytest.approx([1e-2 * factors[step] for step in steps])


def test_the_loss_is_the_weighted_sum_of_that_batch_alone(logged: list[dict[str, Any]]) -> None:
    for line in logged:
        terms = 0.1 * line[f"loss/train/sparsity/{A}"] + line["loss/train/logits_kl"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)


def test_grad_norm_is_there_on_optimizer_steps_only_and_measured_before_clipping(
    logged: list[dict[str, Any]], tmp_path: Path, model: Path, rows: Path
) -> None:
    assert [line["samples"] for line in logged if "grad_norm" in line] == [8, 16, 20]
    unclipped, clipped = (
        lines_of(train(run_config(model, rows, tmp_path, n_samples=2, max_grad_norm=limit))) for limit in (None, 1e-3)
    )
    assert unclipped[0]["grad_norm"] == clipped[0]["grad_norm"] > 1e-3


def test_accumulation_leaves_the_first_loss_undivided(
    logged: list[dict[str, Any]], tmp_path: Path, model: Path, rows: Path
) -> None:
    alone = train(run_config(model, rows, tmp_path, loss=E2E, n_samples=2, train_data={"shuffle": False}))
    assert lines_of(alone)[0]["loss"] == logged[0]["loss"]


@pytest.mark.parametrize(("every", "expected"), [(0, [8]), (4, [2, 6, 8]), (100, [2, 8]), (None, [])])
def test_evaluations_are_at_the_first_batch_every_n_samples_and_the_last(
    tmp_path: Path, model: Path, rows: Path, every: int | None, expected: list[int]
) -> None:
    config = run_config(
        model,
        rows,
        tmp_path,
        n_samples=8,
        eval_every_n_samples=every,
        eval_n_samples=2,
        train_data={"holdout_fraction": 0.3},
    )
    lines = lines_of(train(config))
    assert [line["samples"] for line in lines if "performance/eval/ce_increase" in line] == expected


def test_a_batch_without_counted_tokens_is_logged_as_null_and_teaches_nothing(tmp_path: Path, model: Path) -> None:
    tokens = random_tokens(6, N_CTX)
    tokens[tokens == 7] = 8
    tokens[:2] = 7
    pq.write_table(pa.table({"input_ids": list(tokens.numpy())}), tmp_path / "t.parquet")
    data = {"exclude_token_ids": [7], "shuffle": False}
    run = train(run_config(model, tmp_path / "t.parquet", tmp_path, loss=E2E, train_data=data))
    first = lines_of(run)[0]
    assert first["loss"] == 0
    assert first["grad_norm"] == 0
    assert first["loss/train/logits_kl"] is None
    assert first["performance/train/ce_increase"] is None
    assert all(line["loss"] > 0 for line in lines_of(run)[1:])


# --- observing changes nothing ---


def test_logging_evaluating_saving_and_counting_leave_the_weights_as_they_were(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    silent: dict[str, Any] = {
        "log_every_n_grad_steps": 1000,
        "collect_act_frequency_every_n_samples": 0,
        "eval_every_n_samples": None,
    }
    busy: dict[str, Any] = {
        "eval_every_n_samples": 2,
        "eval_n_samples": 2,
        "save_every_n_samples": 2,
        "collect_act_frequency_every_n_samples": 2,
        "act_frequency_n_tokens": 8,
    }
    common: dict[str, Any] = {"loss": E2E_DS, "n_samples": 12, "train_data": {"holdout_fraction": 0.3}}
    a = train(run_config(model, rows, tmp_path, **common, **silent))
    torch.manual_seed(123)  # nor does it matter what the global generator is at
    b = train(run_config(model, rows, tmp_path, **common, **busy))
    assert len(lines_of(a)) == 2
    assert len(lines_of(b)) == 6
    assert_same(weights(a), weights(b))


def test_the_same_config_gives_the_same_weights_and_the_same_log_and_another_seed_does_not(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    values: dict[str, Any] = {"n_samples": 4, "saes": {"sae_positions": [A, B]}}
    a, b = (train(run_config(model, rows, tmp_path, **values)) for _ in range(2))
    assert_same(weights(a), weights(b))
    assert lines_of(a) == lines_of(b)
    other = weights(train(run_config(model, rows, tmp_path, **values, seed=1)))
    assert not any(torch.equal(other[key], tensor) for key, tensor in weights(a).items())


# --- failures ---


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_loss_that_is_not_finite_ends_the_run_with_code_1_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The warm-up's first step has lr 0 and is saved; the second makes weights of 1e36, whose squares overflow.
    values = run_values(model, rows, tmp_path / "out", lr=1e37, warmup_samples=20, save_every_n_samples=2)
    with console():
        code = main(["train", str(write_config(tmp_path / "c.yaml", values))])
    error = capsys.readouterr().err
    assert code == 1
    assert f"loss term 'out_to_in/{A}' is inf at step 3: stopped before that optimizer step" in error
    assert "Traceback" not in error
    (run,) = (tmp_path / "out").iterdir()
    assert f"the last checkpoint is {run.resolve() / 'samples_4'}" in error
    assert [line["samples"] for line in lines_of(run)] == [2, 4]
    assert not (run / "summary.json").exists()
    start = weights(train(run_config(model, rows, tmp_path / "start", n_samples=2, warmup_samples=20)))
    assert_same(weights(run / "samples_2"), start)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, model: Path, rows: Path) -> None:
    member = set_up(run_config(model, rows, tmp_path)).member
    assert member.run_dir is not None
    member.save(0, 0, {})
    before = files_in(member.run_dir.path)
    with torch.no_grad():
        next(iter(member.model.saes.parameters()))[0, 0] = math.inf
    with pytest.raises(RunFailed, match=f"the SAE at {A} is not finite any more at step 4.*samples_0"):
        member.save(6, 3, {})
    assert files_in(member.run_dir.path) == before
    member.close()


@pytest.mark.parametrize("asks", ["check", "save"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_found_when_asked_for(
    tmp_path: Path, model: Path, rows: Path, asks: str
) -> None:
    parts = set_up(run_config(model, rows, tmp_path))
    member, batch = parts.member, TokenBatch.of(random_tokens(2, N_CTX))
    result = member.backward(run_clean(parts.lm, batch, member.clean_names, want_logits=False), 1.0, 7)
    parameters = list(member.model.saes.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    before = [parameter.detach().clone() for parameter in parameters]
    member.step(7, result)
    with pytest.raises(RunFailed, match="the gradient's norm is nan at step 8.*no checkpoint had been saved"):
        member.check() if asks == "check" else member.save(16, 8, {})
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert member.run_dir is not None
    assert member.run_dir.checkpoints() == []
    member.close()


@pytest.mark.parametrize("effective_batch_size", [2, 4], ids=["one batch a step", "two batches a step"])
def test_a_bad_step_between_two_lines_of_the_log_stops_at_the_next_with_the_weights_of_before(
    tmp_path: Path, model: Path, rows: Path, effective_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"effective_batch_size": effective_batch_size, "lr_schedule": "linear"}
    values |= {"log_every_n_grad_steps": 4, "train_data": {"shuffle": False}}
    n_good = 2 * effective_batch_size
    good = weights(train(run_config(model, rows, tmp_path / "good", n_samples=n_good, **values)))
    # The first batch of the third step is bad, and none after it.
    honest, n_batches = OutToInLoss.values, iter(range(1000))

    def values_with_a_bad_batch(self: OutToInLoss, *passes: Pass) -> dict[str, Mean]:
        factor = math.inf if next(n_batches) * 2 == n_good else 1.0
        return {name: Mean(mean.sum * factor, mean.count) for name, mean in honest(self, *passes).items()}

    monkeypatch.setattr(OutToInLoss, "values", values_with_a_bad_batch)
    parts = set_up(run_config(model, rows, tmp_path / "bad", n_samples=20, **values))
    trainer = Trainer(parts.member.config, parts.lm, [parts.member], parts.train_batches, None, 5, parts.device)
    with pytest.raises(RunFailed, match=f"loss term 'out_to_in/{A}' is inf at step 3: stopped before"):
        trainer.run()
    assert trainer.state.n_steps == 4
    sae = dict(parts.member.model.saes_at()[Position(A, A)].named_parameters())
    assert_same({f"{A}/{key}": tensor.detach() for key, tensor in sae.items()}, good)
    parts.member.close()
    assert parts.member.run_dir is not None
    assert [line["samples"] for line in lines_of(parts.member.run_dir.path)] == [2]


# --- data from a thread ---


def streaming_trainer(model: Path, rows: Path, save_dir: Path, read: Callable[[], Iterator[np.ndarray]]) -> Trainer:
    config = run_config(model, rows, save_dir, effective_batch_size=4, train_data={"shuffle": False})
    parts = set_up(config)
    batches = StreamedBatches(read, N_CTX, RowOrder(shuffle=False))
    return Trainer(config, parts.lm, parts.members, batches, None, parts.n_groups, parts.device)


def n_prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_rows_that_are_streamed_in_a_thread_train_the_same_weights_and_the_wait_is_said_but_not_logged(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    seen_in: set[str] = set()

    def read() -> Iterator[np.ndarray]:
        seen_in.add(threading.current_thread().name)
        yield from random_tokens(20, N_CTX).numpy()

    trainer = streaming_trainer(model, rows, tmp_path / "streamed", read)
    with console() as said:
        trainer.run()
    trainer.members[0].close()
    assert seen_in == {"prefetch"}
    assert n_prefetch_threads() == 0
    values: dict[str, Any] = {"effective_batch_size": 4, "train_data": {"shuffle": False}}
    with console() as said_without:
        plain = train(run_config(model, rows, tmp_path / "plain", **values))
    for lines in (said, said_without):
        (line,) = [line for line in lines if "waited" in line]
        assert line.startswith("waited for data ")
    assert trainer.members[0].run_dir is not None
    streamed = trainer.members[0].run_dir.path
    assert_same(weights(streamed), weights(plain))
    assert lines_of(streamed) == lines_of(plain)


@pytest.mark.parametrize("ends", ["the data are broken", "the loss is"])
def test_a_run_that_ends_with_an_error_leaves_no_thread(tmp_path: Path, model: Path, rows: Path, ends: str) -> None:
    def read() -> Iterator[np.ndarray]:
        yield from random_tokens(8, N_CTX).numpy()
        if ends == "the data are broken":
            raise UserError("row 8 holds no token ids")
        yield from random_tokens(1000, N_CTX).numpy()

    trainer = streaming_trainer(model, rows, tmp_path, read)
    if ends == "the loss is":
        with torch.no_grad():
            next(iter(trainer.members[0].model.saes.parameters())).fill_(math.nan)
    expected = UserError if ends == "the data are broken" else RunFailed
    with pytest.raises(expected, match="row 8 holds no token ids|is nan at step 1") as caught:
        trainer.run()
    # The traceback still holds every frame.
    assert caught.value.__traceback__ is not None
    assert n_prefetch_threads() == 0
    # `with_last` is one step ahead: the step before the broken rows is not made, those before it are.
    assert trainer.state.n_steps == (1 if expected is UserError else 0)
    trainer.members[0].close()


# --- what is written ---


def test_without_a_save_dir_nothing_is_written_anywhere_and_the_summary_is_still_said(
    in_tmp_dir: Path, model: Path, rows: Path
) -> None:
    config = run_config(model, rows, None, n_samples=4, eval_every_n_samples=0, train_data={"holdout_fraction": 0.3})
    before = files_in(in_tmp_dir), files_in(model)
    with console() as said:
        assert train(config) is None
    assert (files_in(in_tmp_dir), files_in(model)) == before
    text = "\n".join(said)
    assert "32 latents" in text
    assert "held-out cross-entropy" in text


def test_the_stored_config_has_absolute_paths_and_reads_back_equal(in_tmp_dir: Path, model: Path, rows: Path) -> None:
    folder = in_tmp_dir / "configs"
    folder.mkdir()
    values = run_values(model, rows, None, n_samples=2, loss=E2E_DS)
    values |= {"save_dir": "../out", "train_data": {"dataset_name": "../rows.parquet", "n_ctx": N_CTX}}
    config = Config.from_file(write_config(folder / "c.yaml", values))
    run = train(config)
    assert run is not None
    assert Config.from_file(run / "final_config.yaml") == config
    stored = yaml.safe_load((run / "final_config.yaml").read_text())
    assert Path(stored["save_dir"]).is_absolute()
    assert stored["train_data"]["dataset_name"] == str(rows)
    assert Path(stored["tlens_model_path"]).is_absolute()


def test_a_mistake_that_shows_only_with_the_model_leaves_no_run_folder(tmp_path: Path, model: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="n_samples=999 is more than the 20 rows"):
        train(run_config(model, rows, tmp_path / "out", n_samples=999))
    with pytest.raises(UserError):
        train(run_config(model, rows, tmp_path / "out", saes={"sae_positions": ["blocks.77."]}))
    assert not (tmp_path / "out").exists()


def test_the_summary_counts_the_held_out_rows_and_repeats_the_last_evaluation(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    config = run_config(
        model, rows, tmp_path, batch_size=1, eval_every_n_samples=0, train_data={"holdout_fraction": 0.3}
    )
    run = train(config)
    assert run is not None
    summary, last = json.loads((run / "summary.json").read_text()), lines_of(run)[-1]
    n_held_out = summary["firing_n_tokens"] // N_CTX
    assert summary["firing_data"] == "held-out data"
    assert summary["samples"] + n_held_out == 20
    assert 0 < n_held_out < 15
    assert summary["performance/eval/ce_increase"] == last["performance/eval/ce_increase"]
    assert summary[f"sparsity/L_0_final/{A}"] == pytest.approx(last[f"sparsity/eval/L_0/{A}"])
    alive = last[f"sparsity/eval/alive_dict_elements/{A}"]
    assert summary[f"sparsity/alive_dict_elements_final/{A}"] == alive
    newest = max(run.glob("samples_*"), key=lambda folder: int(folder.name.removeprefix("samples_")))
    assert read_checkpoint_info(newest).firing_data == "held-out data"
    assert int((read_tensors(newest / "firing.safetensors")[A] > 0).sum()) == alive


def test_without_evaluation_data_the_summary_counts_training_data_and_says_so(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    run = train(run_config(model, rows, tmp_path, n_samples=4, act_frequency_n_tokens=6 * N_CTX))
    assert run is not None
    summary = json.loads((run / "summary.json").read_text())
    assert summary["firing_data"] == "the first of the training data"
    assert summary["firing_n_tokens"] == 6 * N_CTX

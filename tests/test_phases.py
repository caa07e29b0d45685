"""Phases: what is on at each step, that a local phase costs what a local run costs, and that runs go on across them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.acts import Output, Pass, SAEPass, TokenBatch
from e2e_sae.checkpoint import run_dir
from e2e_sae.config import Config
from e2e_sae.errors import UserError
from e2e_sae.health import training_trouble
from e2e_sae.losses import LossConfigs, weighted_loss
from e2e_sae.ops.logits import kl_rows_plain
from e2e_sae.phases import first_steps, phase_at, plan_phases
from e2e_sae.train import resume_training, train, train_members
from tests.host_syncs import NoHostSyncs
from tests.killed_runs import assert_ended_alike, killed
from tests.test_host_syncs import batches_of, trainer_of
from tests.test_members import alone, assert_alike, count_block_outputs
from tests.tiny_runs import E2E, E2E_DS, LOCAL, assert_same, console, lines_of, run_values, weights, write_rows

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
BALANCED: dict[str, Any] = {"logits_kl": {"coeff": 1.0}, "kl_balance": "mse"}
LOCAL_THEN_KL: list[dict[str, Any]] = [{"until": 0.6}, {"loss": BALANCED, "lr": 0.005}]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


def phased(model: Path, folder: Path, phases: Any, **changes: Any) -> dict[str, Any]:
    """Returns a local config of 10 steps of 2 samples, with those phases."""
    rows = write_rows(folder / "rows.parquet", 24)
    return run_values(
        model, rows, folder / "out", n_samples=20, train_data={"holdout_fraction": 0.1}, phases=phases, **changes
    )


def planned(values: dict[str, Any], n_samples: int | None = 20) -> Any:
    config = Config.from_dict(values)
    n_steps = None if n_samples is None else n_samples // config.samples_per_step
    return plan_phases(config, n_samples, n_steps)


# --- what is on ---


def test_without_phases_the_run_is_one_phase_of_its_own_settings(model: Path, tmp_path: Path) -> None:
    values = phased(model, tmp_path, None, warmup_samples=4)
    (phase,) = planned(values)
    config = Config.from_dict(values)
    assert (phase.first_step, phase.loss, config.phase_configs) == (0, config.loss, [config])
    # Warm-up over 2 steps from 0, then half a cosine over the other 8 from 1 down to 0.1.
    assert [phase.lr_at(step) for step in (0, 1, 2, 6)] == pytest.approx([0.0, 0.005, 0.01, 0.0055])


def test_a_phase_changes_what_it_names_and_null_leaves_a_term_out(model: Path, tmp_path: Path) -> None:
    loss = {"sparsity": {"coeff": 0.5, "p_norm": 0.8}, "out_to_in": {"coeff": 2.0}}
    phases = [
        {"until": 0.5, "loss": {"sparsity": {"coeff": 0.25}}},
        {"n_samples": 4, "loss.logits_kl.coeff": 3},
        {"loss": {"out_to_in": None, "logits_kl": {"coeff": 1}}},
    ]
    found = [phase.loss for phase in planned(phased(model, tmp_path, phases, loss=loss))]
    assert found == [
        LossConfigs.from_dict({**loss, "sparsity": {"coeff": 0.25, "p_norm": 0.8}}),
        LossConfigs.from_dict({**loss, "logits_kl": {"coeff": 3}}),
        LossConfigs.from_dict({"sparsity": loss["sparsity"], "logits_kl": {"coeff": 1}}),
    ]


def test_the_configs_own_loss_may_be_left_out_where_phases_say_all_of_it(model: Path, tmp_path: Path) -> None:
    values = phased(model, tmp_path, [{"until": 0.5, "loss": LOCAL}, {"loss": E2E}])
    del values["loss"]
    config = Config.from_dict(values)
    assert [phase.loss for phase in planned(values)] == [LossConfigs.from_dict(LOCAL), LossConfigs.from_dict(E2E)]
    assert config.final_loss == LossConfigs.from_dict(E2E)
    assert Config.from_dict(config.to_dict()).phase_configs == config.phase_configs


def test_phases_are_validated_once_and_anew_for_a_copy_with_other_values(model: Path, tmp_path: Path) -> None:
    config = Config.from_dict(phased(model, tmp_path, [{"until": 0.5}, {"loss": E2E}]))
    assert config.phase_configs is config.phase_configs
    copy = config.model_copy(update={"lr": 0.5})
    assert [own.lr for own in copy.phase_configs] == [0.5, 0.5]
    assert [own.lr for own in config.phase_configs] == [0.01, 0.01]
    alone = config.model_copy(update={"phases": None})
    assert alone.phase_configs == [alone]
    assert config == Config.from_dict(config.to_dict())
    assert "phase_configs" not in config.to_dict()


@pytest.mark.parametrize(
    ("phases", "n_steps", "expected"),
    [
        ([{"until": 0.95}, {}], 400, [0, 380]),
        ([{"until": 0.24}, {"until": 0.26}, {}], 10, [0, 2, 3]),  # 2.4 and 2.6 steps
        ([{"n_samples": 7}, {"n_samples": 4}, {}], 10, [0, 4, 6]),  # 3.5 and 2 steps of 2 samples
        ([{"n_samples": 6}, {}], None, [0, 3]),
    ],
)
def test_ends_of_phases_are_rounded_to_whole_steps(
    phases: list[dict[str, Any]], n_steps: int | None, expected: list[int], model: Path, tmp_path: Path
) -> None:
    config = Config.from_dict(phased(model, tmp_path, phases))
    assert config.phases is not None
    assert first_steps(config.phases, n_steps, 2) == expected


def test_a_step_belongs_to_the_last_phase_that_has_begun(model: Path, tmp_path: Path) -> None:
    phases = planned(phased(model, tmp_path, [{"until": 0.3}, {"until": 0.4}, {}]))
    assert [phase_at(phases, step).number for step in range(6)] == [1, 1, 1, 2, 3, 3]


def test_the_runs_schedule_goes_on_through_a_phase_that_sets_none_of_its_own(model: Path, tmp_path: Path) -> None:
    one = planned(phased(model, tmp_path, None, warmup_samples=4))
    two = planned(phased(model, tmp_path, [{"until": 0.5}, {"loss": E2E}], warmup_samples=4))
    assert [phase_at(two, n).lr_at(n) for n in range(10)] == [one[0].lr_at(n) for n in range(10)]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # 4 steps from the peak: the config's cosine, without its warm-up. (1 + cos(pi t/4)) / 2 at t = 2 is 1/2.
        ({"lr": 0.02}, [0.02, None, 0.02 * 0.55, None]),
        ({"min_lr_factor": 0}, [0.01, None, 0.005, None]),
        ({"lr_schedule": "linear", "warmup_samples": 4}, [0.005, 0.01, 0.01, 0.01]),
        # A line that ends one step after the last, as in a whole run: 1, 1, 2/3, 1/3.
        ({"lr_schedule": "linear", "cooldown_samples": 6, "lr": 0.03, "min_lr_factor": 0}, [0.03, 0.03, 0.03, 0.02]),
    ],
)
def test_a_phase_that_sets_a_key_of_the_learning_rate_has_a_schedule_over_its_own_samples(
    own: dict[str, Any], expected: list[float | None], model: Path, tmp_path: Path
) -> None:
    phases = planned(phased(model, tmp_path, [{"until": 0.6}, own], warmup_samples=4))
    for n, lr in enumerate(expected):
        assert lr is None or phases[1].lr_at(6 + n) == pytest.approx(lr)
    assert phases[0].lr_at(0) == 0.0


# --- mistakes ---


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([], "phases"),
        ({"until": 0.5}, "config key 'phases'"),
        ([{}, {}], "phases[0] must say where it ends by either 'until' or 'n_samples' (neither is given)"),
        ([{"until": 0.5, "n_samples": 4}, {}], "(both are given)"),
        ([{"until": 0.5}, {"until": 0.9}], "phases[1] is the last and goes to the end of the run: leave out 'until'"),
        ([{"until": 0.5}, {"until": 0.5}, {}], "the phases' 'until' must rise (given: 0.5, 0.5)"),
        ([{"until": 95}, {}], "config key 'phases.0.until'"),
        ([{"untill": 0.5}, {}], "Did you mean 'until'?"),
        ([{"until": 0.5, "batch_size": 4}, {}], "unknown config key 'phases.0.batch_size'"),
        ([{"until": 0.5}, {"loss": {"logit_kl": {"coeff": 1}}}], "phases[1]: unknown config key 'loss.logit_kl'"),
        ([{"until": 0.5}, {"loss": {"kl_balance": "mse"}}], "phases[1]: config key 'loss': kl_balance: mse weighs"),
        ([{"until": 0.5}, {"cooldown_samples": 2}], "phases[1]: cooldown_samples=2 needs lr_schedule: linear"),
    ],
)
def test_a_mistake_in_phases_is_one_line(phases: Any, words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Config.from_dict(phased(model, tmp_path, phases))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "n_samples", "words"),
    [
        ([{"until": 0.04}, {}], 20, r"phases\[0\] has no whole optimizer step of 2 samples"),
        ([{"n_samples": 8}, {"until": 0.4}, {}], 20, r"phases\[1\] has no whole optimizer step"),
        ([{"n_samples": 20}, {}], 20, r"phases\[1\] would begin after 20 samples, and the run has 20"),
        ([{"until": 0.5}, {}], None, r"phases\[0\].until=0.5 is a share of a run of unknown length: give n_samples"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(
    phases: Any, n_samples: int | None, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        planned(phased(model, tmp_path, phases, lr_schedule="linear"), n_samples)


def test_a_forgotten_sparsity_is_told_of_the_phase(model: Path, tmp_path: Path) -> None:
    values = phased(model, tmp_path, [{"until": 0.5, "loss": LOCAL}, {"loss": {"logits_kl": {"coeff": 1}}}])
    del values["loss"]
    with pytest.raises(UserError, match=r"phases\[1\]: missing config key 'loss.sparsity'"):
        Config.from_dict(values)


# --- the loop ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run of 6 local steps and 4 with the KL, saved after every second one, so also where the second phase begins."""
    values = phased(
        model, tmp_path_factory.mktemp("finished"), LOCAL_THEN_KL, save_every_n_samples=4, eval_every_n_samples=10
    )
    with console() as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dir, "N_RESUMABLE", 5)
        run = train(Config.from_dict(values))
    assert run is not None
    told = [line for line in said if line.startswith("phase ")]
    assert told == [
        "phase 1 of 2 at 0 samples: loss sparsity + out_to_in (local), lr 0.01",
        "phase 2 of 2 at 12 samples: loss sparsity + out_to_in + logits_kl, kl_balance mse, lr 0.005",
    ]
    return run


def test_every_line_says_its_phase_and_logs_that_phases_losses(finished: Path) -> None:
    lines = lines_of(finished)
    assert [line["phase"] for line in lines] == [1] * 6 + [2] * 4
    assert [line["lr"] for line in lines[6:7]] == [0.005]
    for line in lines:
        assert ("loss/train/logits_kl" in line) == ("performance/train/ce_increase" in line) == (line["phase"] == 2)
        if line["phase"] == 2:
            mse, kl = line[f"loss/train/out_to_in/{A}"], line["loss/train/logits_kl"]
            assert line["loss/train/kl_balance"] == pytest.approx(mse / (kl + 1e-8), rel=1e-5)
            # The balanced loss has the size of the MSE alone.
            assert line["loss"] == pytest.approx(mse + 0.1 * line[f"loss/train/sparsity/{A}"], rel=1e-5)


def test_evaluations_report_the_same_in_all_phases(finished: Path) -> None:
    evaluated = [{k for k in line if "/eval/" in k} for line in lines_of(finished)]
    first, *others = [keys for keys in evaluated if keys]
    assert len(others) >= 2
    assert all(keys == first for keys in others)
    assert "loss/eval/logits_kl" in first
    assert "loss/eval/kl_balance" not in first


def test_the_first_phase_is_the_local_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    """A constant learning rate, or that of the local run would be in another place of its cosine."""
    config = Config.from_file(finished / "final_config.yaml")
    values = {**config.to_dict(), "lr_schedule": "linear", "eval_every_n_samples": None, "save_dir": str(tmp_path)}
    both = train(Config.from_dict(values))
    local = train(Config.from_dict({**values, "phases": None, "n_samples": 12}))
    assert both is not None
    assert_same(weights(both / "samples_12"), weights(local))


@pytest.mark.parametrize("keep", [2, 3, 4], ids=["before", "at the boundary", "after"])
def test_a_killed_run_goes_on_bit_for_bit_across_phases(finished: Path, tmp_path: Path, keep: int) -> None:
    run = killed(finished, tmp_path, keep)
    resume_training(run)
    assert_ended_alike(run, finished)


def test_a_local_phase_stops_the_clean_pass_and_runs_no_spliced_one(model: Path, tmp_path: Path) -> None:
    values = phased(model, tmp_path, [{"until": 0.6}, {"loss": E2E}], log_every_n_grad_steps=1000)
    values["saes"]["sae_positions"] = B
    # Ten clean passes reach block 1. Block 2: in the 4 batches with a KL, clean and spliced, and in the 2 ablated runs
    # of the last line.
    assert count_block_outputs(values) == [10, 10, 4 * 2 + 2]


def test_members_have_phases_of_their_own_and_end_as_alone(model: Path, tmp_path: Path) -> None:
    members: list[dict[str, Any]] = [
        {"loss.sparsity.coeff": 0.4},
        {"phases": None, "loss.sparsity.coeff": 0.3},
        {"phases": [{"n_samples": 12, "loss": {"sparsity": {"coeff": 0.2}}}, {"loss": E2E_DS, "lr": 1e-3}], "seed": 1},
    ]
    values = phased(model, tmp_path, LOCAL_THEN_KL, members=members, effective_batch_size=4)
    runs = [run for run in train_members(Config.from_dict(values)) if run is not None]
    assert len(runs) == 3
    for run in runs:
        assert_alike(run, alone(run, tmp_path / "alone"))
    assert ["phase" in line for run in runs for line in lines_of(run)[:1]] == [True, False, True]
    # What phases leave alone is the member's own.
    own = [Config.from_file(run / "final_config.yaml").phase_configs[-1].loss for run in runs]
    assert [loss.sparsity.coeff for loss in own] == [0.4, 0.3, 0.1]


def test_no_step_waits_for_the_device_where_a_balanced_phase_begins(model: Path, tmp_path: Path) -> None:
    changes = {"phases": [{"n_samples": 12}, {"loss": BALANCED}]}
    trainer = trainer_of(tmp_path / "rows.parquet", model, changes)
    groups = [batches_of(trainer, step) for step in range(1, 5)]
    with NoHostSyncs():
        for batches in groups:
            trainer.train_step(batches, is_last=False)
    assert trainer.members[0].wants_logits


def test_the_loss_of_an_earlier_phase_is_no_sign_of_trouble() -> None:
    lines = [{"phase": 1, "loss": 1.0, "grad_norm": 1.0}] * 36 + [{"phase": 2, "loss": 9.0, "grad_norm": 20.0}] * 4
    assert training_trouble(lines) is None
    assert training_trouble([{**line, "phase": 1} for line in lines]) is not None
    assert training_trouble([]) is None


# --- the balance ---


def test_the_balance_is_the_formula_in_value_and_in_every_gradient() -> None:
    def passes() -> tuple[Pass, Pass, list[torch.Tensor]]:
        g = torch.Generator().manual_seed(0)
        x, x_hat, latents, z = [
            torch.randn(2, 3, d, generator=g, dtype=torch.float64, requires_grad=True) for d in (4, 4, 5, 6)
        ]
        batch = TokenBatch(torch.zeros(2, 3, dtype=torch.long), None, 6)
        clean = Pass(batch, output=Output(torch.randn(2, 3, 6, generator=g, dtype=torch.float64)))
        spliced = Pass(batch, sae_acts={A: SAEPass(x, latents.relu(), x_hat)}, output=Output(z))
        return clean, spliced, [x, x_hat, latents, z]

    loss = LossConfigs.from_dict(
        {"sparsity": {"coeff": 0.7}, "out_to_in": {"coeff": 2.5}, "logits_kl": {"coeff": 0.4}, "kl_balance": "mse"}
    )
    clean, spliced, leaves = passes()
    total, values = weighted_loss(loss.terms, clean, spliced, kl_balance=loss.kl_balance)
    total.backward()

    clean, spliced, (x, x_hat, latents, z) = passes()
    assert clean.logits is not None
    mse = 2.5 * ((x - x_hat) ** 2).mean()
    kl = kl_rows_plain(clean.logits.flatten(0, 1), z.flatten(0, 1)).mean()
    alpha = mse.item() / (kl.item() + 1e-8)
    expected = 0.5 * (0.4 * alpha * kl + mse) + 0.7 * latents.relu().sum(-1).mean() / 4
    expected.backward()

    assert values["kl_balance"].value.item() == pytest.approx(alpha, rel=1e-12)
    torch.testing.assert_close(total, expected)
    for ours, plain in zip(leaves, (x, x_hat, latents, z), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


def test_a_batch_without_a_counted_token_has_a_balanced_loss_of_zero() -> None:
    x, x_hat, z = (torch.ones(2, 3, d, requires_grad=True) for d in (4, 4, 6))
    batch = TokenBatch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool), 0)
    clean = Pass(batch, output=Output(torch.zeros(2, 3, 6)))
    spliced = Pass(batch, sae_acts={A: SAEPass(x, torch.ones(2, 3, 5), x_hat)}, output=Output(z))
    loss = LossConfigs.from_dict({**LOCAL, **BALANCED})
    total, _ = weighted_loss(loss.terms, clean, spliced, kl_balance="mse")
    total.backward()
    assert total == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        ({**E2E, "kl_balance": "mse"}, "out_to_in"),
        ({**LOCAL, "kl_balance": "mse"}, "logits_kl"),
        ({**LOCAL, **BALANCED, "out_to_in": {"coeff": 0}}, "out_to_in"),
    ],
)
def test_a_balance_without_both_terms_is_refused(loss: dict[str, Any], missing: str) -> None:
    with pytest.raises(UserError, match=f"needs both, with a coeff above 0: give {missing}, or leave kl_balance out"):
        LossConfigs.from_dict(loss)

"""Options of the optimisation in whole runs: alone or beside others, interrupted or not, the same bit for bit."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.acts import TokenBatch
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.run_dir import read_resume_state
from e2e_sae.config import Config
from e2e_sae.errors import UserError
from e2e_sae.models.runner import run_clean
from e2e_sae.setup import set_up
from e2e_sae.train import resume_training, train
from tests.killed_runs import assert_ended_alike, killed
from tests.test_members import NO_KL, all_killed, alone, assert_alike, group_values, run_group
from tests.tiny_runs import E2E, LOCAL, N_CTX, console, lines_of, run_config, weights, write_rows

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
OPTIONS: list[dict[str, Any]] = [
    {"loss.sparsity": {"coeff": 0.1, "target_l0": 12}, "saes.sae_positions": [A, B]},
    {"loss": LOCAL | NO_KL, "loss.sparsity": {"coeff": 0.1, "warmup_samples": 8, "final_coeff": 1.0}},
    {"optimizer": "radam", "ema_decay": 0.6, "loss.sparsity.target_l0": 4},
    {"optimizer": "adamw", "weight_decay": 0.1, "betas": [0.8, 0.99], "lr_scaling": "inverse_sqrt", "lr": 1e-4},
    {"optimizer": "signum", "loss": LOCAL | NO_KL},
    {
        "optimizer": "muon",
        "loss": LOCAL | NO_KL,
        "ema_decay": 0.7,
        "saes.sae": {"architecture": "batch_topk", "k": 3, "input_norm": "scale"},
    },
    {
        "optimizer": "schedulefree_adamw",
        "lr_schedule": "linear",
        "saes.sae": {"architecture": "matryoshka", "k": 3, "group_fractions": [0.5, 0.5], "decoder_norm": "projected"},
    },
]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[Path]:
    """The run folders of members with those options: 5 steps of 4 samples, saved after steps 2, 4 and 5."""
    return run_group(group_values(model, tmp_path_factory.mktemp("group"), OPTIONS))


@pytest.mark.parametrize("n", range(len(OPTIONS)))
def test_a_member_with_options_is_the_run_of_its_own_config_bit_for_bit(
    group: list[Path], tmp_path: Path, n: int
) -> None:
    assert_alike(group[n], alone(group[n], tmp_path))


def test_interrupted_runs_with_options_end_bit_for_bit_as_uninterrupted_ones(group: list[Path], tmp_path: Path) -> None:
    copies = all_killed(group, tmp_path, [2] * len(group))
    resume_training(copies)
    for copy, reference in zip(copies, group, strict=True):
        assert_alike(copy, reference)


# --- the coefficient ---


def test_the_log_shows_the_coefficient_that_the_loss_was_weighed_with(group: list[Path]) -> None:
    # By hand: 4 samples a step, warm-up over 8, a line from 0.1 to 1 over 20. Some steps have a line for either batch.
    lines = lines_of(group[1])
    assert [line["samples"] for line in lines] == [2, 4, 8, 10, 12, 16, 18, 20]
    expected = [0.0, 0.0, 0.5 * (0.1 + 0.9 * 4 / 20), 0.46, 0.46, 0.1 + 0.9 * 12 / 20, 0.82, 0.82]
    assert [line[f"sparsity/coeff/{A}"] for line in lines] == pytest.approx(expected)
    for line in lines:
        weighed = line[f"sparsity/coeff/{A}"] * line[f"loss/train/sparsity/{A}"] + line[f"loss/train/out_to_in/{A}"]
        assert line["loss"] == pytest.approx(weighed, rel=1e-5)
    aimed = lines_of(group[0])
    for line in aimed:
        penalty = sum(line[f"sparsity/coeff/{at}"] * line[f"loss/train/sparsity/{at}"] for at in (A, B))
        assert line["loss"] == pytest.approx(penalty + line["loss/train/logits_kl"], rel=1e-5)
    # Not sparse enough yet: each SAE's coefficient has risen from step to step, on its own way.
    for at in (A, B):
        coeffs = [line[f"sparsity/coeff/{at}"] for line in aimed if line["samples"] % 4 == 0]
        assert coeffs[0] == pytest.approx(0.1)
        assert coeffs == sorted(set(coeffs))
    assert aimed[-1][f"sparsity/coeff/{A}"] != aimed[-1][f"sparsity/coeff/{B}"]
    assert not [key for line in lines_of(group[3]) for key in line if key.startswith("sparsity/coeff")]


def test_the_summary_holds_the_target_beside_what_was_reached(group: list[Path]) -> None:
    summary = (group[0] / "summary.json").read_text()
    assert f'"sparsity/L_0_target/{A}": 12' in summary
    assert f'"sparsity/L_0_final/{A}"' in summary
    assert "L_0_target" not in (group[1] / "summary.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "e2e", "e2e_ds"])
def test_the_embedded_model_ends_within_5_percent_of_the_target(tmp_path: Path, name: str) -> None:
    file = Path(__file__).resolve().parent.parent / f"demos/{name}.yaml"
    members = [{"loss.sparsity.target_l0": target} for target in (20.0, 50.0, 100.0)]
    config = Config.from_file(file, [f"save_dir={tmp_path}", f"members={members}"])
    for member, run in zip(members, run_group(config.to_dict()), strict=True):
        l0 = lines_of(run)[-1]["sparsity/eval/L_0/blocks.2.hook_resid_pre"]
        assert l0 == pytest.approx(member["loss.sparsity.target_l0"], rel=0.05)


# --- the average ---


@pytest.mark.parametrize(("input_norm", "at"), [("none", A), ("scale", "blocks.0.hook_resid_pre")])
def test_what_is_saved_and_evaluated_is_the_average_of_the_weights_that_training_goes_on_with(
    tmp_path: Path, model: Path, input_norm: str, at: str
) -> None:
    changes: dict[str, Any] = {
        "saes": {"sae_positions": [at], "sae": {"input_norm": input_norm}},
        "n_samples": 6,
        "save_every_n_samples": 2,
        "eval_every_n_samples": 2,
        "eval_data": {"dataset_name": str(write_rows(tmp_path / "eval.parquet", 3, seed=1)), "n_ctx": 8},
    }
    rows = write_rows(tmp_path / "rows.parquet", 6)
    plain = train(run_config(model, rows, tmp_path / "plain", **changes))
    averaged = train(run_config(model, rows, tmp_path / "averaged", ema_decay=0.5, **changes))
    assert plain is not None
    assert averaged is not None
    steps = [weights(plain / f"samples_{n}") for n in (2, 4, 6)]
    for key, average in weights(averaged / "samples_6").items():
        expected = (steps[0][key] + 2 * steps[1][key] + 4 * steps[2][key]) / 7
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert (load_run(averaged).saes[at].info.scales == (1, 1)) == (input_norm == "none")
    if input_norm == "none":
        kept = read_resume_state(averaged / "samples_6")["weights"]
        assert all(torch.equal(a, b) for a, b in zip(kept, _in_order(model, rows, steps[2]), strict=True))
    # After the first step the average is the weights; from then on evaluations differ, and training does not.
    lines = list(zip(lines_of(plain), lines_of(averaged), strict=True))
    of_average = [a["loss/eval/logits_kl"] == b["loss/eval/logits_kl"] for a, b in lines if "loss/eval/logits_kl" in a]
    assert of_average == [True, False, False]
    assert [a["loss"] for a, _ in lines] == [b["loss"] for _, b in lines]


def _in_order(model: Path, rows: Path, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors of a checkpoint in the order of the SAE's parameters."""
    (sae,) = set_up(run_config(model, rows, None)).member.model.saes_at().values()
    return [tensors[f"{A}/{name}"] for name, _ in sae.named_parameters()]


def test_a_threshold_for_use_is_saved_as_the_averaged_weights_want_it(tmp_path: Path, model: Path) -> None:
    """After every step, the batch's smallest latent that the averaged weights make active; the mean over batches."""
    rows = write_rows(tmp_path / "rows.parquet", 6)
    saes = {"sae": {"architecture": "batch_topk", "k": 3}}
    changes: dict[str, Any] = {"saes": saes, "n_samples": 6, "save_every_n_samples": 2, "ema_decay": 0.5, "lr": 0.1}
    config = run_config(model, rows, tmp_path / "out", **changes)
    run = train(config)
    assert run is not None
    parts = set_up(config.model_copy(update={"save_dir": None}))
    smallest: list[float] = []
    for start, batch in enumerate(parts.train_batches.iterate(2)):
        stored = weights(run / f"samples_{2 * start + 2}")
        x = run_clean(parts.lm, TokenBatch.of(batch), [A], want_logits=False).at(A)
        pre_acts = x @ stored[f"{A}/W_enc"] + stored[f"{A}/b_enc"]
        smallest.append(pre_acts.flatten().sort(descending=True).values[3 * 2 * N_CTX - 1].item())
        assert stored[f"{A}/threshold.value"].item() == pytest.approx(sum(smallest) / len(smallest), rel=1e-5)
    assert len(smallest) == 3
    value, n_batches = read_resume_state(run / "samples_6")["buffers"]
    assert value != weights(run)[f"{A}/threshold.value"]
    assert n_batches == 3


# --- moments in 8 bits ---


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_run_with_8_bit_moments_goes_on_bit_for_bit(tmp_path: Path, model: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", 12)
    saes = {"dict_size_to_input_ratio": 20, "sae": {"architecture": "topk", "k": 3}}  # 16 x 320 weights
    repairs = {"after_n_tokens": 20, "resample": {"every_n_samples": 2}}
    changes = {"saes": saes, "optimizer": "adam8bit", "save_every_n_samples": 6, "dead_latents": repairs}
    run = train(run_config(model, rows, tmp_path / "out", **changes))
    assert run is not None
    again = killed(run, tmp_path / "killed", keep=1)
    resume_training(again)
    assert_ended_alike(again, run)


# --- learning rates ---


def test_each_sae_of_a_run_has_the_learning_rate_of_its_size(tmp_path: Path, model: Path) -> None:
    # Every weight moves by lr times the factor: 32 latents at the residual stream (width 16).
    rows = write_rows(tmp_path / "rows.parquet", 4)
    changes: dict[str, Any] = {"optimizer": "signum", "lr": 1e-4, "lr_scaling": "inverse_sqrt", "n_samples": 2}
    sizes = {A: 32, B: 64}
    moved: dict[str, float] = {}
    for at, d_sae in sizes.items():
        saes = {"sae_positions": [at], "dict_size_to_input_ratio": d_sae / 16}
        config = run_config(model, rows, None, saes=saes, **changes)
        parts = set_up(config)
        (sae,) = parts.member.model.saes_at().values()
        before = sae.W_dec.detach().clone()
        run = train(config.model_copy(update={"save_dir": tmp_path / "out"}))
        after = weights(run)[f"{at}/W_dec"]
        moved[at] = (after - before).abs().max().item()
    assert moved[A] == pytest.approx(1e-4 * (2**14 / 32) ** 0.5, rel=1e-3)
    assert moved[B] == pytest.approx(1e-4 * (2**14 / 64) ** 0.5, rel=1e-3)


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {**E2E, "sparsity": {"coeff": 0, "target_l0": 4}}}, "target_l0=4 needs a coeff above 0"),
        ({"loss": {**E2E, "sparsity": {"coeff": 1, "target_l0": 4, "final_coeff": 2}}}, "exclude each other"),
        (
            {
                "loss": {**E2E, "sparsity": {"coeff": 1, "target_l0": 4}},
                "saes": {"sae": {"architecture": "topk", "k": 3}},
            },
            "architecture 'topk' sparse: set saes.sae.k",
        ),
        ({"weight_decay": 0.1}, "weight_decay=0.1 needs optimizer: adamw"),
        ({"optimizer": "sgd"}, "config key 'optimizer': input should be 'adam', 'adamw', 'radam'"),
        ({"ema_decay": 1.0}, "config key 'ema_decay'"),
        ({"ema_decay": 0.9, "optimizer": "schedulefree_adamw"}, "averages the weights by itself: leave out ema_decay"),
        ({"betas": [0.9, 1.0]}, "config key 'betas.1'"),
        ({"optimizer": "adam8bit", "dtype": "float64"}, "optimizer: adam8bit is for float32 SAEs"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, model: Path, changes: dict[str, Any], words: str) -> None:
    rows = write_rows(tmp_path / "rows.parquet", 2)
    with pytest.raises(UserError) as caught:
        run_config(model, rows, None, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_the_latents_cannot_reach_is_told_before_anything_is_written(tmp_path: Path, model: Path) -> None:
    loss = {**LOCAL, "sparsity": {"coeff": 1.0, "target_l0": 32}}
    rows = write_rows(tmp_path / "rows.parquet", 4)
    with console(), pytest.raises(UserError, match=f"cannot be reached by the 32 latents at {A}"):
        train(run_config(model, rows, tmp_path / "out", loss=loss))
    assert not (tmp_path / "out").exists()

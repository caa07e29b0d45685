"""Which latents are dead, counted by hand, and runs in which they are repaired: alone, beside others, and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.acts import Pass, Position, SAEPass, TokenBatch
from e2e_sae.checkpoint.run_dir import RunDir
from e2e_sae.config import Config
from e2e_sae.dead_latents import DeadLatents, DeadLatentsConfig
from e2e_sae.errors import UserError
from e2e_sae.saes.relu import ReluSAE
from e2e_sae.setup import set_up
from e2e_sae.train import Trainer, resume_training, train, train_members
from tests.host_syncs import NoHostSyncs
from tests.killed_runs import assert_ended_alike, killed
from tests.test_host_syncs import trainer_of
from tests.tiny_models import random_tokens
from tests.tiny_runs import (
    E2E,
    E2E_DS,
    LOCAL,
    N_CTX,
    assert_same,
    lines_of,
    run_config,
    run_values,
    weights,
    write_rows,
)

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
BOTH = {"after_n_tokens": 30, "auxk": {"coeff": 0.5}, "resample": {"every_n_samples": 5, "method": "residuals"}}
REPAIRS: dict[str, dict[str, Any]] = {
    "none": {},
    "auxk": {"auxk": {"coeff": 1.0}},
    "inputs": {"resample": {"every_n_samples": 8}},
    "residuals": {"resample": {"every_n_samples": 8, "method": "residuals"}},
}
KEY, RESAMPLED = f"sparsity/dead_latents/{A}", f"sparsity/resampled_latents/{A}"


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


# --- counting ---


def tracker(after_n_tokens: int = 3, **repairs: Any) -> tuple[DeadLatents, ReluSAE]:
    sae = ReluSAE(2, 4, generator=torch.Generator().manual_seed(0))
    config = DeadLatentsConfig.from_dict({"after_n_tokens": after_n_tokens, **repairs})
    return DeadLatents(config, {Position(A, A): sae}), sae


def spliced(latents: list[Any], sae: ReluSAE, excluded: list[int] | None = None) -> Pass:
    """Returns a batch of tokens 0, 1, ... in which the SAE had these latents."""
    c = torch.tensor(latents, dtype=torch.float32)
    tokens = torch.arange(c.shape[0] * c.shape[1]).reshape(c.shape[:2])
    x = torch.zeros(*c.shape[:-1], 2)
    return Pass(TokenBatch.of(tokens, excluded), sae_acts={A: SAEPass(x, c, x + 1, sae=sae)})


def test_a_latent_is_dead_after_so_many_counted_tokens_in_which_it_did_not_fire() -> None:
    dead, sae = tracker(after_n_tokens=5)
    dead.update(spliced([[[1, 0, 0, 0], [0, 2, 0, 0]]], sae))
    assert dead.n_tokens_silent[A].tolist() == [0, 0, 2, 2]
    # The second of three tokens does not count, and with it the firing of the third latent.
    dead.update(spliced([[[1, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 0]]], sae, excluded=[1]))
    assert dead.n_tokens_silent[A].tolist() == [0, 2, 4, 4]
    assert dead.is_dead(A).tolist() == [False] * 4
    # A latent is what is not 0, of whatever sign.
    dead.update(spliced([[[0, 0, 0, -1]]], sae))
    assert dead.n_tokens_silent[A].tolist() == [1, 3, 5, 0]
    assert dead.is_dead(A).tolist() == [False, False, True, False]
    assert dead.log_values() == {KEY: 1}
    # None counts: no time passes.
    dead.update(spliced([[[1, 1, 1, 1]]], sae, excluded=[0]))
    assert dead.n_tokens_silent[A].tolist() == [1, 3, 5, 0]
    assert dead.n_tokens_silent[A].dtype == torch.int64


def test_a_head_that_fires_fires_for_all_and_a_token_counts_once() -> None:
    dead, sae = tracker()
    dead.update(spliced([[[[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 0, 0], [0, 0, 1, 0]]]], sae, excluded=[1]))
    assert dead.n_tokens_silent[A].tolist() == [0, 0, 1, 1]


def test_sae_that_is_frozen_is_left_alone() -> None:
    sae = ReluSAE(2, 4).eval()
    dead = DeadLatents(DeadLatentsConfig.from_dict({"auxk": {}}), {Position(A, A): sae})
    batch = spliced([[[0, 0, 0, 0]]], sae)
    dead.update(batch)
    assert dead.add_auxk(batch, torch.ones(()), {}) == (torch.ones(()), {})
    assert dead.log_values() == {}


def test_auxk_chooses_among_those_that_have_been_silent_longest() -> None:
    """Latents 0, 1, 2 are dead, 2 and 0 for the longest time: two candidates are these, and one is 2."""
    fired = [[[0, 1, 0, 0]]], [[[1, 0, 0, 0]]], [[[0, 1, 0, 0]]], [[[0, 0, 0, 1]]], [[[0, 0, 0, 1]]]
    for n_candidates, expected in [(1, {2}), (2, {0, 2}), (3, {0, 1, 2}), (4, {0, 1, 2}), (9, {0, 1, 2})]:
        dead, sae = tracker(2, auxk={"k": 4, "n_candidates": n_candidates})
        for latents in fired:
            batch = spliced(latents, sae)
            dead.update(batch)
        assert dead.n_tokens_silent[A].tolist() == [3, 2, 5, 0]
        acts = SAEPass(torch.randn(1, 3, 2), torch.zeros(1, 3, 4), torch.randn(1, 3, 2), sae=sae)
        batch = Pass(TokenBatch.of(torch.zeros(1, 3).long()), sae_acts={A: acts})
        total, values = dead.add_auxk(batch, torch.zeros(()), {})
        torch.testing.assert_close(total, values[f"auxk/{A}"].value / 32)
        total.backward()
        assert sae.b_enc.grad is not None
        assert set(sae.b_enc.grad.nonzero().flatten().tolist()) == expected


def test_the_state_goes_on_elsewhere_and_is_no_view_of_another_tracker() -> None:
    dead, sae = tracker()
    dead.update(spliced([[[1, 0, 0, 0], [1, 0, 0, 0]]], sae))
    other, _ = tracker()
    other.load_state(dead.state())
    dead.update(spliced([[[1, 0, 0, 0]]], sae))
    assert other.n_tokens_silent[A].tolist() == [0, 2, 2, 2]


# --- runs ---


@pytest.mark.parametrize("loss", [LOCAL, E2E], ids=["local", "e2e"])
def test_latents_that_were_forced_dead_come_back_with_each_repair_and_not_without(
    model: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    """The biases of the first ten begin far below 0. The members differ in the repair."""
    members = [
        {"dead_latents": {"after_n_tokens": 40, **repairs}, "lr": 0.2 if "auxk" in repairs else 0.01}
        for repairs in REPAIRS.values()
    ]
    changes = {"lr_schedule": "linear", "n_samples": 40, "log_every_n_grad_steps": 3, "members": members}
    config = run_config(model, write_rows(tmp_path / "rows.parquet", 40), None, loss=loss, **changes)
    parts = set_up(config)
    for member in parts.members:
        (sae,) = member.model.saes_at().values()
        with torch.no_grad():
            sae.b_enc[:10] = -4
    Trainer(config, parts.lm, parts.members, parts.train_batches, None, parts.n_groups, parts.device).run()
    for member, (name, repairs) in zip(parts.members, REPAIRS.items(), strict=True):
        # 6 samples are 48 tokens; at 8 it is time to resample.
        assert [line["samples"] for line in member.lines[:3]] == [2, 6, 12]
        assert member.lines[0][KEY] == 0
        assert member.lines[1][KEY] >= 10
        (silent,) = member.state()["dead"]["silent"].values()
        n_back = (silent[:10] < 40).sum()
        assert n_back == 0 if name == "none" else n_back >= 8, name
        assert (f"loss/train/auxk/{A}" in member.lines[-1]) == ("auxk" in repairs)
        if "resample" in repairs:
            assert member.lines[1][RESAMPLED] == 0
            assert member.lines[2][RESAMPLED] >= 10
        else:
            assert RESAMPLED not in member.lines[-1]


@pytest.mark.parametrize(
    ("sae", "shut"),
    [({"architecture": "jumprelu", "initial_threshold": 0.05}, "threshold"), ({"architecture": "gated"}, "b_mag")],
    ids=["jumprelu", "gated"],
)
def test_what_shut_a_latent_is_forgotten_with_what_the_optimizer_knew_of_it(
    model: Path, tmp_path: Path, sae: dict[str, Any], shut: str
) -> None:
    resample = {"every_n_samples": 8, "method": "residuals", "encoder_norm": 1}
    rows, dead = write_rows(tmp_path / "rows.parquet", 12), {"after_n_tokens": 40, "resample": resample}
    config = run_config(model, rows, None, saes={"sae": sae}, dead_latents=dead, lr=1e-3)
    (member,) = (parts := set_up(config)).members
    (own,) = member.model.saes_at().values()
    parameter = own.get_parameter(shut)
    with torch.no_grad():
        parameter[:10] = 9 if shut == "threshold" else -9
    trainer = Trainer(config, parts.lm, parts.members, parts.train_batches, None, parts.n_groups, parts.device)
    steps = torch.stack([*random_tokens(10, N_CTX).split(2)])
    index = [name for name, _ in own.named_parameters()].index(shut)
    for n, tokens in enumerate(steps):
        before = parameter[:10].detach().clone()
        if n == 3:  # after which 8 samples have been seen
            moments = member.state()["optimizer"]["state"][index]["exp_avg_sq"].fill_(1.0)
            trainer.train_step([TokenBatch.of(tokens, start=2 * n)], is_last=False)
            is_new = (parameter[:10] - before).abs() > 8
            assert is_new.sum() >= 8
            assert torch.equal(moments[:10] == 0, is_new)
            continue
        trainer.train_step([TokenBatch.of(tokens, start=2 * n)], is_last=False)
    (silent,) = member.state()["dead"]["silent"].values()
    assert (silent[:10] < 16).sum() >= 5


@pytest.fixture(scope="module", params=["local", "e2e+ds"])
def repaired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished run with both repairs, resampled before its checkpoint at 12 samples and again at 16."""
    folder = tmp_path_factory.mktemp("repaired")
    run = train(
        run_config(
            model,
            write_rows(folder / "rows.parquet", 20),
            folder / "out",
            loss=LOCAL if request.param == "local" else E2E_DS,
            saes={"sae_positions": [A, B], "sae": {"architecture": "topk", "k": 2}},
            n_samples=20,
            effective_batch_size=4 if request.param == "local" else None,
            train_data={"exclude_token_ids": [1, 2, 3]},
            save_every_n_samples=12,
            dead_latents=BOTH,
        )
    )
    assert run is not None
    return run


def test_a_repaired_run_goes_on_bit_for_bit(repaired: Path, tmp_path: Path) -> None:
    assert [path.name for path in RunDir(repaired).checkpoints()] == ["samples_20", "samples_12"]
    run = killed(repaired, tmp_path, keep=1)
    resume_training(run)
    assert_ended_alike(run, repaired)


def test_latents_of_that_run_were_resampled_before_and_after_the_checkpoint(repaired: Path) -> None:
    n_resampled = {line["samples"]: line[RESAMPLED] for line in lines_of(repaired) if line["samples"] % 4 == 0}
    assert 0 < n_resampled[12] < n_resampled[16]
    # Not at the very end: there would be no step left to train them.
    assert n_resampled[16] == n_resampled[20]
    assert any(line[KEY] > 0 for line in lines_of(repaired))


def test_members_with_repairs_are_the_runs_that_they_would_be_alone(model: Path, tmp_path: Path) -> None:
    topk = {"architecture": "topk", "k": 2}
    members: list[dict[str, Any]] = [
        {"dead_latents": BOTH, "saes.sae": topk},
        {"dead_latents": BOTH, "saes.sae": topk, "seed": 4},
        {"dead_latents": {"after_n_tokens": 9}, "loss": {**LOCAL, "logits_kl": None}},
    ]
    rows = write_rows(tmp_path / "rows.parquet", 12)
    values = run_values(model, rows, tmp_path / "out", loss=E2E, train_data={"seed": 0}, members=members)
    runs = train_members(Config.from_dict(values))
    for run, repairs in zip(runs, [BOTH, BOTH, None], strict=True):
        assert run is not None
        alone = train(Config.from_file(run / "final_config.yaml", [f"save_dir={tmp_path / 'alone'}"]))
        assert_same(weights(run), weights(alone))
        assert lines_of(run) == lines_of(alone)
        assert lines_of(run)[-1][KEY] > 0
        assert (RESAMPLED in lines_of(run)[-1]) == (repairs is not None)
    assert lines_of(runs[0])[-1] != lines_of(runs[1])[-1]


def test_counting_alone_changes_nothing(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", 8)
    plain = train(run_config(model, rows, tmp_path / "out"))
    counting = train(run_config(model, rows, tmp_path / "out", dead_latents={"after_n_tokens": 9}))
    assert_same(weights(plain), weights(counting))


def test_resampling_ends_when_it_is_told_to(model: Path, tmp_path: Path) -> None:
    resample = {"every_n_samples": 4, "until_n_samples": 9}
    run = train(
        run_config(
            model,
            write_rows(tmp_path / "rows.parquet", 20),
            tmp_path / "out",
            saes={"sae": {"architecture": "topk", "k": 1}},
            dead_latents={"after_n_tokens": 16, "resample": resample},
        )
    )
    n_resampled = [line[RESAMPLED] for line in lines_of(run)]
    assert n_resampled[2] > n_resampled[0] == 0
    assert n_resampled[3] == n_resampled[-1] > n_resampled[2]


def repair_at_every_step(rows: Path, model: Path, loss: dict[str, Any], data: dict[str, Any], device: str) -> Trainer:
    """Returns a trainer after one step, with `steps_of` it to be made."""
    repairs = {"after_n_tokens": 30, "auxk": {}, "resample": {"every_n_samples": 4, "method": "residuals"}}
    saes = {"sae_positions": [A, B], "sae": {"architecture": "topk", "k": 2}}
    return trainer_of(rows, model, {"loss": loss, "train_data": data, "saes": saes, "dead_latents": repairs}, device)


def steps_of(trainer: Trainer) -> list[list[TokenBatch]]:
    excluded = trainer.config.train_data.exclude_token_ids
    tokens = random_tokens(16, N_CTX).split(2)
    batches = [TokenBatch.of(rows, excluded, trainer.device, start=4 + 2 * i) for i, rows in enumerate(tokens)]
    return [batches[i : i + 2] for i in range(0, 8, 2)]


@pytest.mark.parametrize("loss", [LOCAL, E2E_DS], ids=["local", "e2e+ds"])
@pytest.mark.parametrize("data", [{}, {"exclude_token_ids": [1, 2, 3, 4]}], ids=["all tokens", "some tokens"])
def test_a_step_that_repairs_does_not_wait_for_the_device(
    model: Path, tmp_path: Path, loss: dict[str, Any], data: dict[str, Any]
) -> None:
    trainer = repair_at_every_step(tmp_path / "rows.parquet", model, loss, data, "cpu")
    steps = steps_of(trainer)
    with NoHostSyncs():
        for batches in steps:
            trainer.train_step(batches, is_last=False)
    (member,) = trainer.members
    assert member.state()["dead"]["resampled"][A] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("data", [{}, {"exclude_token_ids": [1, 2, 3, 4]}], ids=["all tokens", "some tokens"])
def test_torch_finds_no_wait_on_a_gpu(model: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    trainer = repair_at_every_step(tmp_path / "rows.parquet", model, E2E_DS, data, "cuda")
    steps = steps_of(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batches in steps:
            trainer.train_step(batches, is_last=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- mistakes ---


OWN = """
from e2e_sae.saes import SAE
import torch

class Mine(SAE):
    def activate(self, pre_acts):
        return torch.relu(pre_acts)

    def encode(self, x):
        return torch.relu(x @ self.W_enc)
"""


@pytest.mark.parametrize(
    ("dead_latents", "words"),
    [
        ({"after_n_tokens": 0}, "'dead_latents.after_n_tokens'"),
        ({"auxk": {"coeff": -1}}, "'dead_latents.auxk.coeff'"),
        ({"auxk": {"k": 0}}, "'dead_latents.auxk.k'"),
        ({"auxk": {"kaux": 3}}, "unknown config key 'dead_latents.auxk.kaux'"),
        ({"resample": {}}, "'dead_latents.resample.every_n_samples'"),
        ({"resample": {"every_n_samples": 3, "method": "random"}}, "'dead_latents.resample.method'"),
    ],
)
def test_mistakes_are_told_by_their_key(model: Path, tmp_path: Path, dead_latents: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_config(model, write_rows(tmp_path / "rows.parquet", 2), None, dead_latents=dead_latents)


@pytest.mark.parametrize(("repair", "options"), [("auxk", {}), ("resample", {"every_n_samples": 2})])
def test_an_architecture_that_does_not_encode_with_w_enc_cannot_be_repaired(
    model: Path, tmp_path: Path, repair: str, options: dict[str, Any]
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    saes = {"sae": {"architecture": f"{tmp_path / 'mine.py'}:Mine"}}
    rows = write_rows(tmp_path / "rows.parquet", 2)
    words = f"dead_latents.{repair} needs latents that come from W_enc and b_enc, and Mine encodes in another way"
    with pytest.raises(UserError, match=words):
        run_config(model, rows, None, saes=saes, dead_latents={repair: options})
    assert run_config(model, rows, None, saes=saes, dead_latents={}).dead_latents == DeadLatentsConfig()

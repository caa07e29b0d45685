import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from e2e_sae.data.batches import IndexedBatches, PackedText, RowOrder, StreamedBatches
from e2e_sae.errors import RunFailed, UserError
from e2e_sae.lm_training.config import LMTrainConfig
from e2e_sae.lm_training.loop import (
    epoch_batches,
    held_out_ce,
    make_optimizers,
    n_rows_per_epoch,
    next_token_ce,
    train_lm,
)

D_VOCAB = 11


def settings(**fields: Any) -> LMTrainConfig:
    return LMTrainConfig.from_dict({"n_epochs": 1, "batch_size": 2, "lr": 1e-2} | fields)


def packed(n_tokens: int = 40, n_ctx: int = 4, bos_id: int | None = 0) -> IndexedBatches:
    return IndexedBatches(PackedText(1 + np.arange(n_tokens) % (D_VOCAB - 1), n_ctx, bos_id), RowOrder())


class Bigram(nn.Module):
    """Predicts the next token from this one, through one hidden block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(D_VOCAB, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.unembed = nn.Linear(8, D_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(torch.relu(self.blocks[0](self.embed(tokens))))


def train(batches: Any = None, eval_batches: Any = None, **fields: Any) -> tuple[Bigram, list[Any]]:
    model = Bigram()
    lines: list[Any] = []
    train_lm(
        model,
        model,
        batches or packed(),
        eval_batches,
        settings(**fields),
        seed=0,
        log=lines.append,
        save=lambda epoch, result: None,
    )
    return model, lines


def test_the_cross_entropy_is_of_each_next_token():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = math.log(3)  # p(2) = 3/6 before the token 2
    tokens = torch.tensor([[1, 2, 3]])
    expected = (-math.log(3 / 6) - math.log(1 / 4)) / 2
    assert next_token_ce(logits, tokens).item() == pytest.approx(expected)


def test_the_held_out_cross_entropy_weighs_rows_equally():
    model = Bigram()
    batches = packed(n_tokens=15)  # five rows: batches of 2, 2 and 1
    rows = torch.cat(list(batches.iterate(100)))
    assert held_out_ce(model, batches, 2) == pytest.approx(next_token_ce(model(rows), rows).item())


def test_random_windows_cut_the_stream_at_an_offset_that_differs_by_epoch():
    batches = packed(n_tokens=41, n_ctx=4, bos_id=0)
    config = settings(random_windows=True, n_epochs=6)
    n_rows = n_rows_per_epoch(batches, config)
    assert n_rows == (41 - 2) // 3
    stream = [1 + i % (D_VOCAB - 1) for i in range(41)]
    offsets: set[int] = set()
    for epoch in range(6):
        rows = torch.cat(list(epoch_batches(batches, config, 0, epoch)))
        assert rows.shape == (n_rows, 4)
        assert rows[:, 0].eq(0).all()
        candidates = [
            first
            for first in range(3)
            if sorted(stream[first + 3 * i : first + 3 * i + 3] for i in range(n_rows)) == sorted(rows[:, 1:].tolist())
        ]
        assert len(candidates) == 1, "the epoch is the stream cut from one offset on"
        offsets.update(candidates)
    assert len(offsets) > 1


def test_without_random_windows_each_epoch_has_the_same_rows_in_another_order():
    batches = packed()
    first, second = (torch.cat(list(epoch_batches(batches, settings(), 0, epoch))).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(torch.cat(list(batches.iterate(100))).tolist())
    assert first != second


def test_a_text_shorter_than_two_windows_still_gives_a_row():
    batches = packed(n_tokens=4)
    assert len(list(epoch_batches(batches, settings(random_windows=True), 0, 0))) == 1


def test_muon_gets_the_matrices_inside_blocks_and_adam_the_rest():
    model = Bigram()
    muon, adam = make_optimizers(model, settings(optimizer="muon", muon_lr=0.5, weight_decay=0.1))
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(8, 8)]
    assert sum(len(g["params"]) for g in adam.param_groups) == len(list(model.parameters())) - 1
    assert muon.param_groups[0]["lr"] == 0.5
    assert muon.param_groups[0]["weight_decay"] == 0.1
    assert adam.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_model_learns_a_sequence_that_repeats(optimizer: str):
    _, lines = train(eval_batches=packed(), n_epochs=30, optimizer=optimizer, random_windows=True)
    # In `packed` a token follows from the one before; only the token after BOS is open (at most ln 10 / 3).
    assert lines[-1]["eval_ce"] < math.log(10) / 3 + 0.15


def test_the_same_seed_gives_the_same_weights():
    first, second = (train(n_epochs=2, random_windows=True)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_accumulated_batches_are_one_step_of_their_mean():
    whole, _ = train(batch_size=4)
    parts, _ = train(batch_size=2, effective_batch_size=4)
    # 13 rows: three whole groups each way; the 13th row makes a step of its own only where it is a whole group.
    assert len(packed().rows) == 13
    whole_12, _ = train(packed(n_tokens=36), batch_size=4)
    parts_12, _ = train(packed(n_tokens=36), batch_size=2, effective_batch_size=4)
    for a, b in zip(whole_12.parameters(), parts_12.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(whole.embed.weight, parts.embed.weight)


def test_the_log_has_mean_losses_rates_and_evaluations():
    _, lines = train(
        packed(n_tokens=60),  # 20 rows, 10 steps
        packed(),
        warmup_samples=4,
        cooldown_fraction=0.5,
        log_every_n_steps=1,
        save_every_n_epochs=1,
    )
    assert [line["grad_updates"] for line in lines[:-1]] == list(range(1, 11))
    # Two steps of warm-up, then 1 up to half of the run, then a line to zero that it would reach after the last step.
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [line["lr"] / 1e-2 for line in lines[:-1]] == pytest.approx(expected)
    assert lines[-1].keys() == {"samples", "epoch", "tokens", "eval_ce"}
    assert lines[-1]["samples"] == 20
    assert lines[-1]["tokens"] == 80


def test_models_are_saved_every_so_many_epochs_and_at_the_end():
    saved: list[int] = []
    model = Bigram()
    train_lm(
        model,
        model,
        packed(),
        None,
        settings(n_epochs=5, save_every_n_epochs=2),
        seed=0,
        log=lambda line: None,
        save=lambda epoch, result: saved.append(epoch),
    )
    assert saved == [2, 4, 5]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(RunFailed, match="the loss is (nan|inf) at optimizer step [0-9]+: lower train.lr"):
        train(lr=1e30, n_epochs=3)


def test_clipping_bounds_the_gradient():
    # Adam forgets the gradient's scale except for its epsilon: a tiny norm leaves the weights almost still.
    still, _ = train(max_grad_norm=1e-14)
    assert (still.embed.weight - Bigram().embed.weight).abs().max() < 1e-6


def test_a_cooldown_needs_data_of_known_length():
    stream = StreamedBatches(lambda: iter(np.ones((4, 4), dtype=np.int64)), 4, RowOrder())
    with pytest.raises(UserError, match="cooldown_fraction needs data of known length"):
        train(stream, cooldown_fraction=0.5)
    _, lines = train(stream, log_every_n_steps=1)
    assert [line["grad_updates"] for line in lines[:-1]] == [1, 2]

"""The public class: the paper's library's methods, on every family, and loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae import SAETransformer
from e2e_sae.acts import CacheActs, SAEActs
from e2e_sae.errors import CheckpointError, MissingFileError, UserError
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from tests.tiny_models import D_MODEL, D_VOCAB, FAMILIES, random_tokens

PRE, MLP = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"


@pytest.fixture
def model(lm_of: Callable[[str], Any]) -> SAETransformer:
    return SAETransformer(lm_of("gpt2"), [PRE, MLP], dict_size_to_input_ratio=4.5, seed=0)


def test_names_keys_and_sizes(model: SAETransformer):
    assert model.raw_sae_positions == [PRE, MLP]
    assert model.all_sae_positions == ["blocks-1-hook_resid_pre", "blocks-2-hook_mlp_out"]
    assert list(model.saes) == model.all_sae_positions
    assert model.hook_shapes == {PRE: (1, 1, D_MODEL), MLP: (1, 1, D_MODEL)}
    assert model.saes["blocks-1-hook_resid_pre"].d_sae == int(4.5 * D_MODEL)


def test_the_seed_decides_and_each_position_has_its_own(lm_of: Callable[[str], Any], model: SAETransformer):
    again = SAETransformer(lm_of("gpt2"), [MLP, PRE], 4.5, seed=0)
    for position, sae in model.saes_at().items():
        assert torch.equal(sae.W_enc, again.saes_at()[position].W_enc)
    first, second = model.saes_at().values()
    assert not torch.equal(first.W_enc, second.W_enc)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_saes_forward_is_forward_raw(family: str, lm_of: Callable[[str], Any]):
    model, tokens = SAETransformer(lm_of(family), [PRE], 2.0), random_tokens(2, 8)
    raw, acts = model.forward_raw(tokens, run_entire_model=True, cache_positions=[MLP])
    logits, nothing = model.forward(tokens, sae_positions=[])
    assert logits is not None
    torch.testing.assert_close(raw, logits)
    torch.testing.assert_close(raw, model.tlens_model(tokens, return_type="logits"))
    assert list(acts) == [PRE, MLP]
    assert nothing == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("final_layer", [1, 2, 3])
def test_forward_raw_can_stop_before_a_block(family: str, final_layer: int, lm_of: Callable[[str], Any]):
    model, tokens = SAETransformer(lm_of(family), [PRE], 2.0), random_tokens(2, 8)
    resid, _ = model.forward_raw(tokens, run_entire_model=False, final_layer=final_layer)
    name = f"blocks.{final_layer - 1}.hook_resid_post"
    _, acts = model.forward_raw(tokens, run_entire_model=True, cache_positions=[name])
    torch.testing.assert_close(resid, acts[name])


def test_forward_raw_refuses_both_ways_to_say_where_to_stop(model: SAETransformer):
    with pytest.raises(UserError, match="either run_entire_model=True or final_layer, not both"):
        model.forward_raw(random_tokens(1, 4), run_entire_model=True, final_layer=1)


def test_forward_records_what_the_saes_did_and_what_was_asked_for(model: SAETransformer):
    post = "blocks.2.hook_resid_post"
    logits, acts = model(random_tokens(2, 8), sae_positions=[PRE, MLP], cache_positions=[post])
    assert logits.shape == (2, 8, D_VOCAB)
    assert isinstance(acts[post], CacheActs)
    sae_acts = acts[PRE]
    assert isinstance(sae_acts, SAEActs)
    x, c, output = sae_acts
    torch.testing.assert_close(model.saes["blocks-1-hook_resid_pre"](x)[0], output)
    assert sae_acts.c is c
    everything, _ = model(random_tokens(2, 8))
    torch.testing.assert_close(everything, logits)


def test_with_clean_activations_the_model_does_not_run(model: SAETransformer):
    tokens = random_tokens(2, 8)
    _, clean = model.forward_raw(tokens, run_entire_model=True)
    logits, acts = model.forward(tokens, [PRE], orig_acts=clean)
    assert logits is None
    assert list(acts) == [PRE]
    sae_acts = acts[PRE]
    assert isinstance(sae_acts, SAEActs)
    torch.testing.assert_close(sae_acts.output, model.saes["blocks-1-hook_resid_pre"](clean[PRE])[0])


def test_an_sae_that_is_not_there_is_named(model: SAETransformer):
    with pytest.raises(UserError, match=r"no SAE at \['blocks.0.hook_resid_pre'\]; SAEs are at"):
        model(random_tokens(1, 4), sae_positions=["blocks.0.hook_resid_pre"])


def test_a_ratio_that_leaves_no_latent_is_refused(lm_of: Callable[[str], Any]):
    with pytest.raises(UserError, match=r"dict_size_to_input_ratio=0.01 leaves no latent .* use at least 0.0625"):
        SAETransformer(lm_of("gpt2"), [PRE], 0.01)


def test_inside_hooks_every_transformer_lens_call_sees_the_spliced_model(model: SAETransformer):
    tokens = random_tokens(1, 6)
    clean = model.tlens_model(tokens, return_type="logits")
    post = "blocks.2.hook_resid_post"
    spliced, acts = model(tokens, cache_positions=[post])
    with model.hooks() as lm:
        torch.testing.assert_close(lm(tokens, return_type="logits"), spliced)
        logits, cache = lm.run_with_cache(tokens)
        torch.testing.assert_close(logits, spliced)
        torch.testing.assert_close(cache[post], acts[post].input)
        torch.testing.assert_close(lm(tokens, return_type="logits"), spliced)
        new = lm.generate(tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    torch.testing.assert_close(model.tlens_model(tokens, return_type="logits"), clean)
    ours = model.generate(tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert torch.equal(torch.as_tensor(new), torch.as_tensor(ours))


@pytest.mark.parametrize("sae_positions", ["all", [PRE], None])
def test_generation_is_greedy_argmax_of_the_chosen_model(sae_positions: Any, model: SAETransformer):
    tokens = random_tokens(2, 4)
    result = model.generate(
        tokens, sae_positions, max_new_tokens=3, stop_at_eos=False, temperature=0.0, do_sample=True, verbose=False
    )
    expected = tokens
    for _ in range(3):
        logits, _ = model(expected, sae_positions=sae_positions or [])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, expected)


def test_generation_of_text_returns_text_without_the_bos(model: SAETransformer):
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    text = model.generate("ab c", **options)
    ids = model.generate("ab c", return_type="tensor", **options)
    assert isinstance(text, str)
    assert text.startswith("ab c")
    assert isinstance(ids, torch.Tensor)
    assert ids.shape == (1, 1 + 4 + 3)


def test_generation_stops_at_the_end_token_and_fills_up_finished_rows(model: SAETransformer):
    tokens = random_tokens(2, 4)
    free = model.generate(tokens, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
    assert isinstance(free, torch.Tensor)
    eos = int(free[0, 5])
    stopped = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=eos, verbose=False)
    assert isinstance(stopped, torch.Tensor)
    for row, whole in zip(stopped.tolist(), free.tolist(), strict=True):
        new = whole[4:]
        end = new.index(eos) + 1 if eos in new else len(new)
        assert row[4 : 4 + end] == new[: stopped.shape[1] - 4][:end]
        assert set(row[4 + end :]) <= {eos}


def test_to_takes_a_dtype_or_a_device_and_nothing_else(lm_of: Callable[[str], Any], tiny_folder: Callable[[str], Path]):
    model = SAETransformer(load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2"))), [PRE])
    assert model.to(torch.float64) is model
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.to("cpu", torch.float32).to(device="cpu", dtype=torch.float32)
    assert model.saes["blocks-1-hook_resid_pre"].dtype == torch.float32
    for arguments in [(), ("cpu", torch.float32, True)]:
        with pytest.raises(ValueError, match="Invalid arguments"):
            model.to(*arguments)
    with pytest.raises(ValueError, match="Invalid keyword argument"):
        model.to(non_blocking=True)


@pytest.mark.parametrize("case", ["local", "e2e", "e2e_ds", "mixed_multi"])
def test_each_golden_run_folder_loads_with_its_own_model(case: str, shared: Path):
    from safetensors.torch import load_file

    model = SAETransformer.from_local_path(shared / "golden" / case / "run", device="cpu")
    state = torch.load(shared / "golden" / case / "run" / "samples_144.pt", weights_only=True)
    for position, sae in model.saes_at().items():
        key = position.name.replace(".", "-")
        assert torch.equal(sae.encoder[0].weight, state[f"{key}.encoder.0.weight"])
        assert torch.equal(sae.encoder[0].bias, state[f"{key}.encoder.0.bias"])
        assert torch.equal(sae.decoder.weight, state[f"{key}.decoder.weight"])
        assert torch.equal(sae.decoder.bias, state[f"{key}.decoder.bias"])
    tokens = load_file(shared / "golden" / "tokens.safetensors")["eval"][-6:].long()
    expected = load_file(shared / "golden" / case / "last_eval_batch_logits.safetensors")
    with torch.inference_mode():
        clean, _ = model.forward_raw(tokens, run_entire_model=True)
        spliced, _ = model(tokens)
    found = {name: logits for name, logits in expected.items() if logits.shape == clean.shape}
    assert len(found) == 2
    for name, logits in found.items():
        ours = spliced if name == "spliced_logits" else clean
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0, msg=name)


def test_loading_says_what_is_wrong(tmp_path: Path, lm_of: Callable[[str], Any]):
    with pytest.raises(UserError, match="either checkpoint_dir, or checkpoint_file together with config_file"):
        SAETransformer.from_local_path()
    with pytest.raises(UserError, match="checkpoint_file and config_file go together"):
        SAETransformer.from_local_path(checkpoint_file=tmp_path / "samples_1.pt")
    with pytest.raises(MissingFileError, match="no such run folder or checkpoint"):
        SAETransformer.from_local_path(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="has no checkpoint: expected samples_<n>"):
        SAETransformer.from_local_path(tmp_path)
    key = "blocks-1-hook_resid_pre"
    shapes = {"encoder.0.weight": (8, 3), "encoder.0.bias": (8,), "decoder.weight": (3, 8), "decoder.bias": (3,)}
    state = {f"{key}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "samples_7.pt")
    with pytest.raises(CheckpointError, match="does not say which language model it belongs to: pass model="):
        SAETransformer.from_local_path(tmp_path)
    message = f"has width 3, this model's activation there {D_MODEL}: it was trained on another model"
    with pytest.raises(CheckpointError, match=message):
        SAETransformer.from_local_path(tmp_path, model=lm_of("gpt2"))

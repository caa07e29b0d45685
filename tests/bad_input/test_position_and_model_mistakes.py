"""Hook points that match nothing or cannot do what is asked, and language models that cannot be had."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from e2e_sae.models.tlens import has_hooked_transformer
from e2e_sae.scripts.cli import main
from tests.bad_input.bench import Bench, RunsCode

SAE_POSITIONS = [
    (
        "blocks.1.hook_resid_prr",
        "no hook point matches the pattern 'blocks.1.hook_resid_prr'. Did you mean 'blocks.1.hook",
    ),
    (
        "blocks.3.hook_resid_pre",
        "no hook point matches the pattern 'blocks.3.hook_resid_pre'. The model's blocks are 0 to 2",
    ),
    ("[blocks.1, blocks.7.hook_mlp_out]", "the pattern 'blocks.7.hook_mlp_out'. The model's blocks are 0 to 2"),
    ("'blocks.*.resid'", "the shell pattern (it must match a whole name) 'blocks.*.resid'. Did you mean"),
    ("xyz", "no hook point matches the pattern 'xyz'. The points of block 0 and around are: hook_embed,"),
    ("blocks.1.attn.hook_result", "exists, but the model's forward pass does not go through it"),
    ("blocks.1.attn.hook_attn_scores", "the activation at 'blocks.1.attn.hook_attn_scores' is no vector per token"),
]
DOWNSTREAM = [
    (
        "[blocks.2.hook_resid_prr]",
        "no hook point is called 'blocks.2.hook_resid_prr'. Did you mean 'blocks.2.hook_resid_pre'",
    ),
    ("[hook_resid_post]", "no hook point is called 'hook_resid_post'. Did you mean"),
    ("[blocks.3.hook_resid_pre]", "no hook point is called 'blocks.3.hook_resid_pre'. The model's blocks are 0 to 2"),
    (
        "[blocks.0.hook_resid_pre]",
        "['blocks.0.hook_resid_pre'] do not come after the first SAE (blocks.1.hook_resid_pre)",
    ),
    ("[hook_embed]", "['hook_embed'] do not come after the first SAE (blocks.1.hook_resid_pre): it cannot change them"),
    ("[blocks.1.hook_resid_pre]", "do not come after the first SAE"),
    ("[blocks.2.attn.hook_pattern]", "the activation at 'blocks.2.attn.hook_pattern' is no vector per token"),
    ("[]", "config key 'loss.in_to_orig.hook_positions': list should have at least 1 item"),
]


@pytest.mark.parametrize(("positions", "words"), SAE_POSITIONS)
def test_sae_positions_that_cannot_be_are_refused_with_near_candidates(
    bench: Bench, refused: Callable[..., str], positions: str, words: str
) -> None:
    assert words in refused("train", bench.config, "--set", f"saes.sae_positions={positions}")


@pytest.mark.parametrize(("positions", "words"), DOWNSTREAM)
def test_downstream_positions_that_cannot_be_are_refused(
    bench: Bench, refused: Callable[..., str], positions: str, words: str
) -> None:
    override = f"loss.in_to_orig={{total_coeff: 1, hook_positions: {positions}}}"
    assert words in refused("train", bench.config, "--set", override)


def test_a_downstream_position_given_twice_counts_once_and_one_that_is_always_0_is_said(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    listed = "[blocks.0.hook_resid_pre, blocks.2.hook_resid_pre, blocks.2.hook_resid_pre]"
    overrides = [f"loss.in_to_orig={{total_coeff: 1, hook_positions: {listed}}}", f"save_dir={tmp_path / 'out'}"]
    assert main(["train", str(bench.config), *bench.sets(overrides)]) == 0
    assert "WARNING: loss.in_to_orig.hook_positions ['blocks.0.hook_resid_pre']" in capsys.readouterr().err
    (log,) = tmp_path.glob("out/*/metrics.jsonl")
    line = json.loads(log.read_text().splitlines()[0])
    weights = {"in_to_orig/blocks.0.hook_resid_pre": 0.5, "in_to_orig/blocks.2.hook_resid_pre": 0.5}
    weights |= {"sparsity/blocks.1.hook_resid_pre": 0.1, "logits_kl": 1.0}
    expected = sum(weight * line[f"loss/train/{name}"] for name, weight in weights.items())
    assert line["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("empty_folder", "empty_folder' is no Hugging Face model folder, it has no config.json"),
        ("a_file", "a_file' needs the final_config.yaml it was saved with"),
    ],
)
def test_a_path_that_holds_no_model_is_refused(
    bench: Bench, refused: Callable[..., str], model: str, words: str
) -> None:
    assert words in refused("train", bench.config, "--set", f"tlens_model_path={model}")


def test_a_hub_model_that_is_not_known_is_refused_with_near_names(bench: Bench, refused: Callable[..., str]) -> None:
    message = refused("train", bench.config, *bench.sets(["tlens_model_path=null", "tlens_model_name=gpt2-smal"]))
    assert "model 'gpt2-smal'" in message
    assert "Did you mean 'gpt2-small'" in message
    overrides = ["tlens_model_path=null", "tlens_model_name=FOLDER/gpt2"]
    assert "gpt2' is a folder here: give it as tlens_model_path" in refused(
        "train", bench.config, *bench.sets(overrides)
    )


@pytest.mark.skipif(has_hooked_transformer(), reason="TransformerLens 3 has HookedTransformer")
def test_a_class_that_this_transformer_lens_lacks_is_refused(bench: Bench, refused: Callable[..., str]) -> None:
    message = refused("train", bench.config, "--set", "tlens_model_class=hooked")
    assert "tlens_model_class 'hooked' needs TransformerLens 3" in message


@pytest.fixture
def model_copy(bench: Bench, tmp_path: Path) -> Path:
    """A model folder that may be damaged."""
    shutil.copytree(bench.folder / "gpt2", tmp_path / "model")
    return tmp_path / "model"


def test_a_damaged_model_folder_is_refused(bench: Bench, refused: Callable[..., str], model_copy: Path) -> None:
    def message() -> str:
        return refused("train", bench.config, "--set", f"tlens_model_path={model_copy}")

    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"the weights in '{model_copy}' cannot be read" in message()
    weights.unlink()
    assert f"the weights in '{model_copy}' cannot be read" in message()
    (model_copy / "config.json").write_text('{"model_type": "no_such_family"}')
    assert f"'{model_copy}' holds no language model transformers knows" in message()
    (model_copy / "config.json").write_text("[]")
    assert "config.json' is damaged: expected a JSON object" in message()


def test_model_weights_with_code_in_them_are_refused_and_the_code_does_not_run(
    bench: Bench, refused: Callable[..., str], model_copy: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    (model_copy / "model.safetensors").unlink()
    torch.save({"a": RunsCode(marker)}, model_copy / "pytorch_model.bin")
    message = refused("train", bench.config, "--set", f"tlens_model_path={model_copy}")
    assert "hold pickled code besides tensors and were refused: use safetensors" in message
    torch.save({"a": RunsCode(marker)}, tmp_path / "model.pt")
    config = "tlens_config: {d_model: 8, n_layers: 1, n_ctx: 8, d_head: 4, d_vocab: 50, act_fn: gelu}\n"
    (tmp_path / "final_config.yaml").write_text(config)
    message = refused("train", bench.config, "--set", f"tlens_model_path={tmp_path / 'model.pt'}")
    assert "model.pt' holds pickled code besides tensors and was refused" in message
    assert not marker.exists()

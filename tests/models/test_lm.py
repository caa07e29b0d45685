"""Loading language models: they compute what Hugging Face computes, and refuse what they cannot load."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from e2e_sae.errors import CheckpointError, MissingFileError, UserError
from e2e_sae.models import lm
from e2e_sae.models.lm_config import LMConfig, ModelClass, ProcessingConfig
from e2e_sae.models.tlens import has_hooked_transformer, quietly, resolve_model_class
from e2e_sae.models.tokenizers import require_tokenizer
from tests.tiny_models import D_MODEL, D_VOCAB, FAMILIES, N_CTX, Bomb, make_model_folder, random_tokens

CLASSES: list[Any] = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]
AUTO: Any = CLASSES[0]
RAW = ProcessingConfig(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)


def log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(tokens)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("processing", [ProcessingConfig(), RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_agree_with_hugging_face(
    tiny_folder: Callable[[str], Path], family: str, processing: ProcessingConfig, model_class: Any
):
    folder = tiny_folder(family)
    model = lm.load_lm(LMConfig(tlens_model_path=folder, tlens_model_class=model_class, processing=processing))
    tokens = random_tokens(2)
    reference = log_probs(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)
    torch.testing.assert_close(log_probs(model, tokens), reference, atol=5e-6, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
def test_stories260k_loads_and_agrees_with_hugging_face(shared: Path, model_class: Any):
    folder = shared / "data" / "lm" / "stories260K"
    model = lm.load_lm(LMConfig(tlens_model_path=folder, tlens_model_class=model_class))
    tokens = require_tokenizer(model)("Once upon a time, there was a little girl", return_tensors="pt")
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = log_probs(reference, tokens["input_ids"])
    torch.testing.assert_close(log_probs(model, tokens["input_ids"]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
def test_processing_centres_and_folds_what_it_says(tiny_folder: Callable[[str], Path], model_class: Any):
    def logits_and_stream(processing: ProcessingConfig) -> tuple[Tensor, Tensor]:
        config = LMConfig(tlens_model_path=tiny_folder("gpt2"), tlens_model_class=model_class, processing=processing)
        model: Any = lm.load_lm(config)
        stream: list[Tensor] = []
        watch = ("blocks.1.hook_resid_pre", lambda x, hook: stream.append(x))
        with model.hooks(fwd_hooks=[watch]):
            return model(random_tokens(2)), stream[0]

    raw_logits, raw_stream = logits_and_stream(RAW)
    logits, stream = logits_and_stream(ProcessingConfig())
    # Centred writing weights: the stream loses its mean and nothing else (biases, embeddings centred too).
    torch.testing.assert_close(stream, raw_stream - raw_stream.mean(-1, keepdim=True), atol=1e-5, rtol=0)
    # A centred unembedding gives logits of mean zero.
    torch.testing.assert_close(logits.mean(-1), torch.zeros(2, N_CTX), atol=1e-5, rtol=0)
    assert raw_logits.mean(-1).abs().max() > 1e-2
    # One option alone is honoured as well.
    only_unembed = RAW.model_copy(update={"center_unembed": True})
    logits, stream = logits_and_stream(only_unembed)
    torch.testing.assert_close(stream, raw_stream)
    torch.testing.assert_close(logits, raw_logits - raw_logits.mean(-1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
def test_facts_freezing_and_silence(
    tiny_folder: Callable[[str], Path], model_class: Any, capfd: pytest.CaptureFixture[str]
):
    model = lm.load_lm(LMConfig(tlens_model_path=tiny_folder("llama"), tlens_model_class=model_class))
    assert capfd.readouterr() == ("", "")
    facts = lm.model_facts(model)
    assert facts[:4] == (3, D_MODEL, D_VOCAB, N_CTX)
    assert (facts.device, facts.dtype) == (torch.device("cpu"), torch.float32)
    assert facts.class_name == ("TransformerBridge" if lm.is_bridge(model) else "HookedTransformer")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype_is_honoured(tiny_folder: Callable[[str], Path], model_class: Any, dtype: Any):
    config = LMConfig(tlens_model_path=tiny_folder("gpt2"), tlens_model_class=model_class, dtype=dtype)
    model = lm.load_lm(config)
    assert lm.model_facts(model).dtype == getattr(torch, dtype)
    assert model(random_tokens(1)).dtype == getattr(torch, dtype)


def test_auto_is_hooked_where_it_exists():
    assert resolve_model_class("auto") == AUTO
    assert set(get_args(ModelClass)) == {"auto", "hooked", "bridge"}


@pytest.mark.skipif(has_hooked_transformer(), reason="TransformerLens 3 has HookedTransformer")
def test_hooked_on_tlens_4_says_what_to_install(tiny_folder: Callable[[str], Path]):
    with pytest.raises(UserError, match=r'pip install "transformer-lens<4", or choose \'bridge\''):
        lm.load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2"), tlens_model_class="hooked"))


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="no device is called 'gpu0'"):
        lm.resolve_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'cuda' was asked for, but torch sees no CUDA device"):
            lm.resolve_device("cuda")
        assert lm.resolve_device("auto") == torch.device("cpu")
    else:
        assert lm.resolve_device("cuda") == torch.device("cuda", torch.cuda.current_device())


def test_silence_spares_our_own_warnings_and_leaves_logging_as_it_was(caplog: pytest.LogCaptureFixture):
    handlers, filters = list(logging.root.handlers), list(logging.root.filters)
    with quietly():
        logging.getLogger("transformer_lens.somewhere").warning("noise")
        logging.warning("noise")
        logging.getLogger("e2e_sae").warning("ours")
    assert [record.message for record in caplog.records] == ["ours"]
    assert (logging.root.handlers, logging.root.filters) == (handlers, filters)


# --- tokenizers


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_tokenizer_files_only_text_is_an_error(tmp_path: Path, family: str, model_class: Any):
    folder = make_model_folder(tmp_path / "bare", family, with_tokenizer=False)
    model: Any = lm.load_lm(LMConfig(tlens_model_path=folder, tlens_model_class=model_class))
    assert model.tokenizer is None
    assert model(random_tokens(1)).shape == (1, N_CTX, D_VOCAB)
    assert model.generate(random_tokens(1, 4), max_new_tokens=2, stop_at_eos=False, verbose=False).shape == (
        1,
        6,
    )
    with pytest.raises(UserError, match=r"text must be tokenised.*set tokenizer_name"):
        require_tokenizer(model)


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_folders_tokenizer_is_used(tiny_folder: Callable[[str], Path], model_class: Any):
    model: Any = lm.load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2"), tlens_model_class=model_class))
    # Ids by hand: 0 is BOS, then newline, space, a, b, c.
    assert model.to_tokens("ab c").tolist() == [[0, 3, 4, 2, 5]]
    assert require_tokenizer(model).decode([3, 4]) == "ab"


def test_a_damaged_tokenizer_is_reported_and_not_fatal(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = make_model_folder(tmp_path / "bad")
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    model: Any = lm.load_lm(LMConfig(tlens_model_path=folder))
    assert model.tokenizer is None
    assert "tokenizer in" in caplog.text


def test_a_local_model_never_asks_the_network(tiny_folder: Callable[[str], Path], repo: Path):
    # In a process of its own: this one is offline by the environment.
    program = f"""
import socket, sys
sys.path.insert(0, {str(repo)!r})
attempts = []
def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("refused")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from pathlib import Path
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
model = load_lm(LMConfig(tlens_model_path=Path({str(tiny_folder("llama"))!r})))
print(attempts, model.to_tokens("ab").tolist())
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[] [[0, 3, 4]]\n", done.stderr


# --- folders that cannot be loaded


def load(folder: Path) -> nn.Module:
    return lm.load_lm(LMConfig(tlens_model_path=folder))


def test_a_folder_without_config_is_no_model(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"is no Hugging Face model folder, it has no config.json"):
        load(tmp_path)
    (tmp_path / "final_config.yaml").write_text("a: 1", encoding="utf-8")
    (tmp_path / "epoch_1.pt").write_bytes(b"")
    with pytest.raises(MissingFileError, match=r"for the legacy model give the file, '.*epoch_1.pt'"):
        load(tmp_path)


def test_an_unknown_path_is_an_error_of_the_config(tmp_path: Path):
    with pytest.raises(UserError, match="no such file or folder"):
        LMConfig.from_dict({"tlens_model_path": str(tmp_path / "nothing")})


def test_damaged_config_and_weights_are_named(tmp_path: Path):
    folder = make_model_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"the weights in '.*m' cannot be read"):
        load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: .*no file named"):
        load(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json' is damaged"):
        load(folder)


def test_missing_tensors_are_not_replaced_by_random_ones(tmp_path: Path):
    from safetensors.torch import save_file

    folder = make_model_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"incomplete: .*h\.1\.mlp\.c_fc\.weight missing"):
        load(folder)


def test_architectures_nobody_supports_are_named(tmp_path: Path):
    folder = make_model_folder(tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    unknown = settings | {"model_type": "nonsense", "architectures": ["NonsenseForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(unknown), encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no language model transformers knows: .*nonsense"):
        load(folder)


def test_architectures_tlens_does_not_support_are_named(tmp_path: Path):
    from transformers import CTRLConfig

    config = CTRLConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, dff=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"TransformerLens .* cannot load CTRLLMHeadModel from"):
        load(tmp_path)


def test_pickled_code_in_folder_weights_is_refused(tmp_path: Path):
    folder = make_model_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="hold pickled code besides tensors and were refused"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


# --- names on the hub


def test_names_that_cannot_be_had_say_why():
    problem = "knows no model" if AUTO == "hooked" else "not in the local cache, and HF_HUB_OFFLINE forbids"
    with pytest.raises(UserError, match=problem):
        lm.load_lm(LMConfig(tlens_model_name="nobody/no-such-model"))
    with pytest.raises(UserError, match=r"'gpt2' cannot be loaded from the hub .* HF_HUB_OFFLINE forbids the network"):
        lm.load_lm(LMConfig(tlens_model_name="gpt2"))


def test_a_hub_name_that_is_a_folder_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model_folder(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'gpt2' is a folder here: give it as tlens_model_path"):
        lm.load_lm(LMConfig(tlens_model_name="gpt2"))


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_cached_hub_model_loads_by_name_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_class: Any
):
    # The hub's cache as a download leaves it: refs/<branch> names a commit, snapshots/<commit> has the files.
    cached = tmp_path / "models--gpt2"
    seeds = {"main": 0, "other": 1}
    for branch, seed in seeds.items():
        commit = str(seed) * 40
        folder = make_model_folder(cached / "snapshots" / commit, seed=seed)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(settings | {"n_ctx": N_CTX}), encoding="utf-8")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / branch).write_text(commit, encoding="utf-8")
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    for branch in seeds:
        revision = None if branch == "main" else branch
        config = LMConfig(tlens_model_name="gpt2", revision=revision, tlens_model_class=model_class)
        model = lm.load_lm(config)
        commit = (cached / "refs" / branch).read_text(encoding="utf-8")
        reference = AutoModelForCausalLM.from_pretrained(cached / "snapshots" / commit).eval()
        tokens = random_tokens(1)
        torch.testing.assert_close(log_probs(model, tokens), log_probs(reference, tokens), atol=5e-6, rtol=0)


# --- legacy .pt files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of 'tlens_model_name' and 'tlens_model_path' must be given .given: neither"),
        ({"tlens_model_name": "gpt2", "tlens_model_path": "."}, "must be given .given: both"),
        ({"tlens_model_path": ".", "revision": "x"}, "'revision' needs 'tlens_model_name'"),
        ({"tlens_model_name": "gpt2", "revision": "x", "checkpoint_index": 1}, "exclude each other"),
        ({"tlens_model_name": "gpt2", "tlens_model_class": "hook"}, "tlens_model_class.*'hooked'"),
        ({"tlens_model_name": "gpt2", "processing": {"fold": True}}, "processing.fold.*fold_ln"),
    ],
)
def test_contradictory_configs_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        LMConfig.from_dict(values)


def test_processing_defaults_are_those_of_tlens():
    import inspect

    from transformer_lens.model_bridge import TransformerBridge

    signature = inspect.signature(TransformerBridge.enable_compatibility_mode)
    for name, value in ProcessingConfig().model_dump().items():
        assert signature.parameters[name].default is value, name

# type: ignore
"""A script as a user of the paper's library has it: every call is written after that library's documentation.

It knows nothing of ours, and of types as little as scripts do. `test_paper_user_script.py` runs it.
"""

from pathlib import Path
from typing import Any

import torch
import yaml

from e2e_sae import SAETransformer
from e2e_sae.losses import LossConfigs, calc_loss
from e2e_sae.metrics import calc_output_metrics, calc_sparsity_metrics
from e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes import Config
from e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes import main as run_training
from e2e_sae.utils import filter_names, set_seed


def use_run(checkpoint_dir: Path, tokens: torch.Tensor, prompt: str) -> dict[str, Any]:
    """Loads a trained run, looks at its parts, runs it both ways, and generates."""
    set_seed(0)
    model = SAETransformer.from_local_path(checkpoint_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    model = model.to(device=device, dtype=torch.float32)
    tokens = tokens.to(device)

    position = model.raw_sae_positions[0]
    sae = model.saes[position.replace(".", "-")]
    assert model.all_sae_positions == [name.replace(".", "-") for name in model.raw_sae_positions]
    d, n = sae.input_size, sae.n_dict_components
    assert model.hook_shapes[position] == torch.Size([1, 1, d])
    assert sae.dict_elements.shape == (d, n)
    assert sae.encoder[0].weight.shape == (n, d)
    assert sae.encoder[0].bias.shape == (n,)
    assert sae.decoder.weight.shape == (d, n)
    assert sae.decoder.bias.shape == (d,)
    assert sae.device.type == device.type
    norms = sae.dict_elements.norm(dim=0)

    later = filter_names(list(model.tlens_model.hook_dict.keys()), "blocks.3.hook_resid_post")
    with torch.no_grad():
        orig_logits, orig_acts = model.forward_raw(tokens=tokens, run_entire_model=True, cache_positions=later)
        resid, _ = model.forward_raw(tokens, run_entire_model=False, final_layer=1)
        new_logits, new_acts = model(tokens, sae_positions=model.raw_sae_positions, cache_positions=later)
        same_logits, nothing = model.forward(tokens=tokens, sae_positions=[])
        no_logits, local_acts = model(tokens, sae_positions=model.raw_sae_positions, orig_acts=orig_acts)
    assert no_logits is None
    assert nothing == {}
    acts = new_acts[position]
    x_hat, c = sae(acts.input)
    by_hand = torch.relu(sae.encoder(acts.input)) @ sae.dict_elements.T + sae.decoder.bias

    loss_configs = LossConfigs(
        sparsity={"coeff": 1.0}, in_to_orig=None, out_to_orig=None, out_to_in={"coeff": 1.0}, logits_kl={"coeff": 0.5}
    )
    saes_only = {name: orig_acts[name] for name in model.raw_sae_positions}
    loss, loss_dict = calc_loss(
        orig_acts=saes_only,
        new_acts={name: new_acts[name] for name in model.raw_sae_positions},
        orig_logits=orig_logits,
        new_logits=new_logits,
        loss_configs=loss_configs,
        is_log_step=True,
        train=False,
    )
    return {
        "norms": norms,
        "orig_logits": orig_logits,
        "new_logits": new_logits,
        "same_logits": same_logits,
        "resid": resid,
        "acts": acts,
        "from_sae": (x_hat, c),
        "by_hand": by_hand,
        "local_acts": local_acts[position],
        "orig_acts": orig_acts,
        "loss": loss,
        "logs": {
            **loss_dict,
            **calc_sparsity_metrics(new_acts, train=False),
            **calc_output_metrics(tokens, orig_logits, new_logits, train=False),
        },
        "with_saes": model.generate(prompt, sae_positions="all", max_new_tokens=4, temperature=0.0, verbose=False),
        "without": model.generate(input=prompt, sae_positions=None, max_new_tokens=4, temperature=0.0, verbose=False),
        "ids": model.generate(tokens[:, :3], max_new_tokens=2, stop_at_eos=False, verbose=False),
    }


def train_from_python(values: dict[str, Any]) -> Path:
    """Trains as the paper's notebook does: a `Config` of nested dictionaries."""
    return run_training(Config(**values))


def train_from_yaml(values: dict[str, Any], path: Path) -> Path:
    """Trains from a file whose numbers are as people write them."""
    text = yaml.safe_dump(values).replace("lr: 0.005", "lr: 5e-3").replace("n_samples: 1000", "n_samples: 1_000")
    assert "5e-3" in text
    assert "1_000" in text
    path.write_text(text)
    return run_training(str(path))

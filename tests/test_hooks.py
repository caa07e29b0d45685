"""Hook names: what patterns select, on both model classes, and what the errors say."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae import hooks
from e2e_sae.errors import UserError
from e2e_sae.models.lm import is_bridge, load_lm
from e2e_sae.models.lm_config import LMConfig
from e2e_sae.models.tlens import has_hooked_transformer
from tests.tiny_models import FAMILIES, random_tokens

BLOCK_POINTS = [
    "hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z",
    "hook_attn_out", "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out",
    "hook_resid_post",
]  # fmt: skip
CLASSES = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]

LoadTiny = Callable[[str], Any]


@pytest.fixture(scope="module", params=CLASSES)
def load_tiny(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> LoadTiny:
    loaded: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in loaded:
            config = LMConfig(tlens_model_path=tiny_folder(family), tlens_model_class=request.param)
            loaded[family] = load_lm(config)
        return loaded[family]

    return load


def test_usable_names_of_gpt2_are_the_legacy_names_in_the_order_of_the_computation(load_tiny: LoadTiny):
    expected = ["hook_embed", "hook_pos_embed"]
    expected += [f"blocks.{block}.{point}" for block in range(3) for point in BLOCK_POINTS]
    expected += ["ln_final.hook_normalized"]
    assert hooks.usable_hook_names(load_tiny("gpt2")) == expected


def test_gated_mlps_have_one_more_point_and_rotary_models_no_position_embedding(load_tiny: LoadTiny):
    names = hooks.usable_hook_names(load_tiny("llama"))
    assert "hook_pos_embed" not in names
    assert [n for n in names if n.startswith("blocks.1.mlp")] == [
        "blocks.1.mlp.hook_pre",
        "blocks.1.mlp.hook_pre_linear",
        "blocks.1.mlp.hook_post",
    ]


@pytest.mark.parametrize(("family", "has_mid"), [("neox", False), ("neox_sequential", True)])
def test_parallel_blocks_have_no_middle_of_the_residual_stream(load_tiny: LoadTiny, family: str, has_mid: bool):
    assert ("blocks.1.hook_resid_mid" in hooks.usable_hook_names(load_tiny(family))) is has_mid


# TransformerLens says that a replaced norm is recomputed, with other rounding.
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_usable_point_fires_and_replacing_its_value_changes_the_output(load_tiny: LoadTiny, family: str):
    model = load_tiny(family)
    tokens = random_tokens(2, 5)
    plain = model(tokens)
    for name in hooks.usable_hook_names(model):
        with model.hooks(fwd_hooks=[(name, lambda x, hook: x.flip(-1) + 1)]):
            assert not torch.allclose(model(tokens), plain, atol=1e-3), name


def test_shapes_show_heads_and_leave_out_points_that_do_not_fire(load_tiny: LoadTiny):
    model = load_tiny("llama")
    names = [
        "blocks.0.attn.hook_q",
        "blocks.0.attn.hook_k",
        "blocks.2.mlp.hook_post",
        "blocks.1.attn.hook_result",
    ]
    assert hooks.hook_shapes(model, names) == {
        "blocks.0.attn.hook_q": (1, 2, 2, 8),
        "blocks.0.attn.hook_k": (1, 2, 1, 8),  # one key-value head for two query heads
        "blocks.2.mlp.hook_post": (1, 2, 32),
    }


def test_asking_for_shapes_leaves_the_users_hooks_and_no_others(load_tiny: LoadTiny):
    model = load_tiny("gpt2")
    calls: list[str] = []
    name = "blocks.1.hook_resid_pre"
    with model.hooks(fwd_hooks=[(name, lambda x, hook: calls.append("user"))]):
        hooks.usable_hook_names(model)
        calls.clear()
        model(random_tokens(1, 3))
        assert calls == ["user"]
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def test_plain_patterns_are_substrings_of_usable_names(load_tiny: LoadTiny):
    model = load_tiny("gpt2")
    assert hooks.resolve_hook_names(model, ["resid_post"]) == [f"blocks.{b}.hook_resid_post" for b in range(3)]
    assert hooks.resolve_hook_names(model, "blocks.1.attn.hook_q") == ["blocks.1.attn.hook_q"]
    assert hooks.resolve_hook_names(model, ["blocks.1"]) == [f"blocks.1.{point}" for point in BLOCK_POINTS]


def test_block_1_as_a_substring_selects_block_10_too(tmp_path: Path):
    from tests.tiny_models import make_model_folder

    model = load_lm(LMConfig(tlens_model_path=make_model_folder(tmp_path / "deep", n_layers=11)))
    found = hooks.resolve_hook_names(model, ["blocks.1", "blocks.*.hook_resid_pre"])
    assert {hooks.block_of(name) for name in found if name.endswith("mlp_out")} == {1, 10}
    # Block 2 comes before block 10: the order is the computation's, not the alphabet's.
    assert [hooks.block_of(n) for n in found if n.endswith("resid_pre")] == list(range(11))


def test_shell_patterns_match_whole_names_and_results_are_ordered_without_repeats(load_tiny: LoadTiny):
    model = load_tiny("gpt2")
    assert hooks.resolve_hook_names(model, ["blocks.[02].hook_mlp_out"]) == [
        "blocks.0.hook_mlp_out",
        "blocks.2.hook_mlp_out",
    ]
    assert hooks.resolve_hook_names(model, ["blocks.2.hook_resid_p*", "blocks.?.hook_resid_pre", "hook_embed"]) == [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_pre",
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_resid_post",
    ]
    with pytest.raises(UserError, match="must match a whole name"):
        hooks.resolve_hook_names(model, ["resid_p*"])


def test_an_exact_name_selects_any_point_that_fires(load_tiny: LoadTiny):
    model = load_tiny("gpt2")
    name = "blocks.1.attn.hook_pattern"
    assert name not in hooks.usable_hook_names(model)
    assert hooks.resolve_hook_names(model, [name]) == [name]
    assert hooks.exact_hook_name(model, name) == name


def test_points_that_never_fire_are_refused_by_name(load_tiny: LoadTiny):
    message = "'blocks.1.attn.hook_result' exists, but the model's forward pass does not go through it"
    with pytest.raises(UserError, match=re.escape(message)):
        hooks.resolve_hook_names(load_tiny("gpt2"), ["blocks.1.attn.hook_result"])
    with pytest.raises(UserError, match=re.escape(message)):
        hooks.exact_hook_name(load_tiny("gpt2"), "blocks.1.attn.hook_result")


@pytest.mark.parametrize(
    ("alias", "legacy"),
    [
        ("blocks.2.hook_in", "blocks.2.hook_resid_pre"),
        ("blocks.2.hook_out", "blocks.2.hook_resid_post"),
        ("blocks.0.ln2.hook_in", "blocks.0.hook_resid_mid"),
        ("blocks.0.attn.o.hook_in", "blocks.0.attn.hook_z"),
        ("embed.hook_out", "hook_embed"),
    ],
)
def test_aliases_resolve_to_the_legacy_name(load_tiny: LoadTiny, alias: str, legacy: str):
    model = load_tiny("gpt2")
    if not is_bridge(model):
        pytest.skip("HookedTransformer has no aliases")
    assert hooks.resolve_hook_names(model, [alias]) == [legacy]
    assert hooks.exact_hook_name(model, alias) == legacy


def test_patterns_that_match_nothing_name_near_candidates(load_tiny: LoadTiny):
    model = load_tiny("gpt2")
    with pytest.raises(UserError, match=r"'blocks.1.hook_residpre'.* Did you mean 'blocks.1.hook_resid_pre'"):
        hooks.resolve_hook_names(model, ["blocks.1.hook_residpre"])
    with pytest.raises(UserError, match="The model's blocks are 0 to 2"):
        hooks.resolve_hook_names(model, ["blocks.6.hook_resid_pre"])
    with pytest.raises(UserError, match=r"no hook point is called 'resid_pre'. Did you mean 'blocks"):
        hooks.exact_hook_name(model, "resid_pre")
    with pytest.raises(UserError, match=r"points of block 0 and around are: hook_embed, .*blocks.0.hook_resid_pre"):
        hooks.resolve_hook_names(model, ["zzzz"])
    with pytest.raises(UserError, match="no hook points were given"):
        hooks.resolve_hook_names(model, [])
    with pytest.raises(UserError, match="no hook point matches the pattern ''"):
        hooks.resolve_hook_names(model, [""])


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_sequential"])
def test_a_new_middle_of_the_residual_stream_is_bypassed_on_a_bridge_only(load_tiny: LoadTiny, family: str):
    model = load_tiny(family)
    tokens = random_tokens(1, 5)
    seen: list[torch.Tensor] = []
    # Add 7 to the stream in the middle of the last block, and watch what leaves the block. The norm of the
    # MLP branch removes most of the shift (LayerNorm: all of it), so the skip connection decides.
    name = "blocks.2.hook_resid_mid"
    watch = ("blocks.2.hook_resid_post", lambda x, hook: seen.append(x.clone()))
    with model.hooks(fwd_hooks=[watch]):
        model(tokens)
    with model.hooks(fwd_hooks=[(name, lambda x, hook: x + 7), watch]):
        model(tokens)
    moved = (seen[1] - seen[0]).mean().item() > 3
    assert hooks.is_skip_bypassed(model, name) is not moved
    assert hooks.is_skip_bypassed(model, name) is is_bridge(model)
    assert not hooks.is_skip_bypassed(model, "blocks.2.hook_resid_pre")


def test_sae_keys_round_trip():
    name = "blocks.2.attn.hook_z"
    assert hooks.sae_key(name) == "blocks-2-attn-hook_z"
    assert hooks.hook_name_of_key(hooks.sae_key(name)) == name

"""`e2e_sae.hooks`, and the hook helpers of `e2e_sae.utils`."""

from functools import partial
from typing import Any

import torch

from e2e_sae import SAETransformer
from e2e_sae.acts import CacheActs, SAEActs
from tests.legacy.by_hand import P, Q, draw
from tests.tiny_models import D_MODEL, random_tokens


def test_hooks_store_what_happened_and_give_what_forward_gives(model: SAETransformer):
    from e2e_sae.hooks import cache_hook, sae_hook

    tokens, hook_acts = random_tokens(2, 8), {}
    sae: Any = model.saes["blocks-1-hook_resid_pre"]
    logits = model.tlens_model.run_with_hooks(  # pyright: ignore
        tokens,
        fwd_hooks=[
            (P, partial(sae_hook, sae=sae, hook_acts=hook_acts, hook_key=P)),
            (Q, partial(cache_hook, hook_acts=hook_acts, hook_key=Q)),
        ],
    )
    expected, new_acts = model(tokens, [P], cache_positions=[Q])
    torch.testing.assert_close(logits, expected)
    assert (type(hook_acts[P]), type(hook_acts[Q])) == (SAEActs, CacheActs)
    torch.testing.assert_close(hook_acts[P].c, new_acts[P].c)
    torch.testing.assert_close(hook_acts[Q].input, new_acts[Q].input)


def test_records_have_the_legacy_fields():
    from e2e_sae.hooks import CacheActs as LegacyCacheActs
    from e2e_sae.hooks import SAEActs as LegacySAEActs

    assert (LegacySAEActs._fields, LegacyCacheActs._fields) == (("input", "c", "output"), ("input",))
    assert torch.equal(LegacySAEActs(input=draw(1, 2), c=draw(1, 3), output=draw(1, 2)).latents, draw(1, 3))


def test_names_are_filtered_by_substring_in_their_own_order():
    from e2e_sae.utils import filter_names

    names = [f"blocks.{i}.hook_resid_{end}" for i in (0, 1, 10) for end in ("pre", "post")]
    assert filter_names(names, "blocks.1") == names[2:]
    assert filter_names(names, ["0.hook_resid_post", "blocks.0"]) == [names[0], names[1], names[5]]
    assert filter_names(names, "blocks.1.hook_resid_pre") == [names[2]]


def test_hook_shapes_are_those_of_one_token(lm: Any):
    from e2e_sae.utils import get_hook_shapes

    shapes = get_hook_shapes(lm, [P, "blocks.0.attn.hook_z"])
    assert shapes == {P: (1, 1, D_MODEL), "blocks.0.attn.hook_z": (1, 1, 2, D_MODEL // 2)}

import pytest

import lorabook as lb
from lorabook.blocks import block_of, kind_of, target_modules


def test_the_map_of_tiny_sd_has_the_blocks_of_stable_diffusion_1_5(pipe):
    modules = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_k")]
    sizes = {block: len(names) for block, names in lb.block_map(modules).items()}
    assert sizes == {
        "down.0": 2,
        "down.1": 2,
        "down.2": 2,
        "mid": 1,
        "up.1": 3,
        "up.2": 3,
        "up.3": 3,
    }


@pytest.mark.parametrize(
    ("module", "block", "kind"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down.1", "attention"),
        ("up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k", "up.3", "cross-attention"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "mid", "feed-forward"),
        ("mid_block.resnets.1.conv1", "mid", "resnet"),
        ("down_blocks.0.downsamplers.0.conv", "down.0", "sampler"),
        ("up_blocks.2.attentions.0.proj_in", "up.2", "projection"),
        ("time_embedding.linear_1", "outside", "embedding"),
    ],
)
def test_block_and_kind_of_a_module(module, block, kind):
    assert (block_of(module), kind_of(module)) == (block, kind)


def test_each_target_adapts_what_the_one_before_does_and_more():
    attention, middle, everything = (
        set(target_modules(t)) for t in ("attention", "attention+ff", "all")
    )
    assert attention < middle < everything


def test_an_unknown_target_lists_the_targets():
    with pytest.raises(ValueError, match="attention, attention\\+ff, all"):
        target_modules("everything")

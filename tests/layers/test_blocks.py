import pytest
import torch
from torch import nn

from crossmae_det.layers.blocks import CrossAttentionBlock


def random_block(self_attention):
    torch.manual_seed(0)
    block = CrossAttentionBlock(
        8, 6, 2, mlp_ratio=2.0, norm_layer=nn.LayerNorm, self_attention=self_attention
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(2, 5, 8), torch.randn(2, 3, 6)


@pytest.mark.parametrize("self_attention", [False, True])
def test_decoder_block_is_pre_norm_with_residuals(self_attention):
    block, x, memory = random_block(self_attention)
    got = block(x, memory)
    if self_attention:
        x = x + block.self_attn(block.self_norm(x))
    x = x + block.cross_attn(block.norm1(x), memory)
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
    torch.testing.assert_close(got, x + block.mlp.fc2(hidden))
    assert block.mlp.fc1.out_features == 16


@pytest.mark.parametrize("self_attention", [False, True])
def test_queries_see_each_other_only_through_self_attention(self_attention):
    block, x, memory = random_block(self_attention)
    changed = x.clone()
    changed[:, 2] += 1
    before, after = block(x, memory), block(changed, memory)
    others = [0, 1, 3, 4]
    assert not torch.equal(before[:, 2], after[:, 2])
    assert torch.equal(before[:, others], after[:, others]) != self_attention

"""Bidirectional attention within each sequence of a packed batch.

Shape legend: T rows in all, H query heads, K key/value heads (K divides H), D head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .packing import PackedSequences


def attention(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
    """Softmax attention of every row to all rows of its own sequence.

    Rows are laid out as a padded block just around the attention product, with a mask over the keys; everything else in
    the model runs on packed rows. On a CPU this takes about half the time of one block-diagonal mask.

    Args:
        q: [T, H, D].
        k, v: [T, K, D].
        packed: the batch that the rows belong to.

    Returns:
        [T, H, D].
    """
    if q.shape[0] == 0:
        return q + 0 * (k.sum() + v.sum())  # no rows, and still a graph through all three
    block = packed.block
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    padded_q, padded_k, padded_v = (block.pad(x).transpose(1, 2) for x in (q, k, v))
    mask = None if block.mask is None else block.mask[:, None, None, :]
    out = F.scaled_dot_product_attention(padded_q, padded_k, padded_v, attn_mask=mask)
    return block.unpad(out.transpose(1, 2))

"""Media to soft tokens: no encoders, one small embedder for pixels and one projection for raw samples."""

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import TextConfig, VisionConfig
from mlx_gemma4.model.matrix import product

# Not rms_norm_eps: the published modules are torch LayerNorms with their default.
LAYER_NORM_EPS = 1e-5


def media_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Of all that is computed of media where a model computes in `dtype`: float16 has no room for the sums of pixels
    that a checkpoint may have, and rounds quiet sounds away."""
    return mx.float32 if dtype == mx.float16 else dtype


class VisionEmbedder(nn.Module):
    """Patches of pixels and where they lie to vectors, as `model.vision_embedder` of the checkpoint."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        pixels, dims = config.patch_side**2 * 3, config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(pixels, LAYER_NORM_EPS)
        self.patch_dense = nn.Linear(pixels, dims)
        self.patch_ln2 = nn.LayerNorm(dims, LAYER_NORM_EPS)
        self.pos_embedding = mx.zeros((config.mm_posemb_size, 2, dims))
        self.pos_norm = nn.LayerNorm(dims, LAYER_NORM_EPS)

    def __call__(self, pixels: mx.array, positions: mx.array, adapters: mx.array | None = None) -> mx.array:
        """pixels [n, side * side * 3] uint8, positions [n, 2] as (x, y) -> [n, mm_embed_dim].

        adapters [1]: as the decoder's; what is adapted by it is [1, n, …].
        """
        # LayerNorm takes the mean away; taking away the exact mean of the integers first keeps float32 sums of
        # thousands of pixels from drifting (100 times less error where contrast is low)
        mean = pixels.astype(mx.int32).sum(axis=-1, keepdims=True) / pixels.shape[-1]
        x = ((pixels - mean) / 255).astype(media_dtype(self.patch_ln1.weight.dtype))
        x = self.patch_ln2(product(self.patch_dense, self.patch_ln1(x), adapters))
        x = x + self.pos_embedding[positions[:, 0], 0] + self.pos_embedding[positions[:, 1], 1]
        return self.pos_norm(x)


class MultimodalProjection(nn.Module):
    """RMSNorm without weight, then a linear map into the decoder's space."""

    def __init__(self, dims: int, rms_norm_eps: float, text: TextConfig):
        super().__init__()
        self.embedding_projection = nn.Linear(dims, text.hidden_size, bias=False)
        self.eps = rms_norm_eps

    def __call__(self, x: mx.array, adapters: mx.array | None = None) -> mx.array:
        """[n, dims] -> [n, hidden]; adapters as `VisionEmbedder` takes them."""
        return product(self.embedding_projection, mx.fast.rms_norm(x, None, self.eps), adapters)

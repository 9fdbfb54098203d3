"""The Wan 2.1 and 2.2 video transformer, with the parameter names of the original checkpoints.

Shapes: B batch, C latent channels, F H W latent frames/height/width, f h w the same in patches, L video tokens (f*h*w),
S text tokens, D width, N heads, K head width. T is L where timesteps differ per token, else 1.
No autocast: the dtype of the weights is the compute dtype; where float32 is needed, the cast is written out. In bf16
the residual stream is bf16, while norm statistics, modulation, gates, RoPE, the time path and the head are float32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs import WanConfig
from wan.errors import InputError


def rope_frequencies(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Rotations [L, 1, K/2] (complex64) of each token's frame, row and column: RoPE with theta 10000 per axis.

    Of K head channels, K - 4*(K//6) turn with the frame and 2*(K//6) each with the row and the column.
    """
    side = 2 * (head_dim // 6)
    axes = []
    for axis, (length, width) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        positions = torch.arange(length, dtype=torch.float64, device=device)
        angles = torch.outer(positions, 10000.0**-exponents)
        shape = [length if axis == other else 1 for other in range(3)]
        axes.append(angles.reshape(*shape, -1).expand(*grid, -1))
    angles_LK = rearrange(torch.cat(axes, dim=-1), "f h w K -> (f h w) 1 K")
    return torch.polar(torch.ones_like(angles_LK), angles_LK).to(torch.complex64)


def apply_rope(x_BLNK: Tensor, freqs: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs in float32; the dtype of `x_BLNK` comes back."""
    pairs = torch.view_as_complex(x_BLNK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(x_BLNK.dtype)


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """float32 [..., width]: cosines then sines of t (0..1000) times 10000^(-i / (width/2)), taken in float64."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.double().unsqueeze(-1) * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class LinearFloat32(nn.Linear):
    """A linear layer that computes in float32, in `pieces` of rows so that there is never a whole float32 copy."""

    def __init__(self, in_features: int, out_features: int, pieces: int = 1):
        super().__init__(in_features, out_features)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.weight.chunk(self.pieces), self.bias.chunk(self.pieces)
        return torch.cat([F.linear(x, w.float(), b.float()) for w, b in zip(weights, biases, strict=True)], dim=-1)


def modulated_norm(x_BLD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """float32 layer norm of `x_BLD` without weights, scaled by 1 + scale and shifted (both [B, T, D])."""
    return torch.addcmul(shift, F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps), 1 + scale)


def gated_residual(x_BLD: Tensor, y_BLD: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate: the float32 gate [B, T, D] promotes both operations, so the result is rounded only once."""
    return (x_BLD + y_BLD * gate).to(x_BLD.dtype)


def attention(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """Softmax attention over all keys, with the heads joined: [B, L, D]."""
    q_BNLK, k_BNSK, v_BNSK = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    return F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The projections of both kinds of attention; queries and keys are normalised over the whole width."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=config.eps) for _ in range(2))

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    def forward(self, x_BLD: Tensor, freqs: Tensor) -> Tensor:
        q_BLNK = apply_rope(self.split_heads(self.norm_q(self.q(x_BLD))), freqs)
        k_BLNK = apply_rope(self.split_heads(self.norm_k(self.k(x_BLD))), freqs)
        v_BLNK = self.split_heads(self.v(x_BLD))
        return self.o(attention(q_BLNK, k_BLNK, v_BLNK))


class CrossAttention(Attention):
    def forward(self, x_BLD: Tensor, context_BSD: Tensor) -> Tensor:
        q_BLNK = self.split_heads(self.norm_q(self.q(x_BLD)))
        k_BSNK = self.split_heads(self.norm_k(self.k(context_BSD)))
        v_BSNK = self.split_heads(self.v(context_BSD))
        return self.o(attention(q_BLNK, k_BSNK, v_BSNK))


class WanBlock(nn.Module):
    """One transformer block: modulated self-attention, cross-attention to the text, modulated feed-forward."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x_BLD: Tensor, e0: Tensor, freqs: Tensor, context_BSD: Tensor) -> Tensor:
        """`e0` is float32 [B, T, 6, D]: shift, scale, gate of the self-attention, then those of the feed-forward."""
        # Two or one of the six at a time: per token, each is as large as x_BLD in float32.
        shift, scale = self.modulation_rows(e0, 0, 1)
        y_BLD = modulated_norm(x_BLD, shift, scale, self.eps).to(x_BLD.dtype)
        (gate,) = self.modulation_rows(e0, 2)
        x_BLD = gated_residual(x_BLD, self.self_attn(y_BLD, freqs), gate)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD), context_BSD)
        shift, scale = self.modulation_rows(e0, 3, 4)
        y_BLD = modulated_norm(x_BLD, shift, scale, self.eps).to(x_BLD.dtype)
        (gate,) = self.modulation_rows(e0, 5)
        return gated_residual(x_BLD, self.ffn(y_BLD), gate)

    def modulation_rows(self, e0: Tensor, *rows: int) -> list[Tensor]:
        return [self.modulation.float()[:, row] + e0[:, :, row] for row in rows]


class Head(nn.Module):
    """The last modulated norm, then the projection of every token to the pixels of its patch, in float32."""

    def __init__(self, config: WanConfig):
        super().__init__()
        frames, rows, columns = config.patch_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = LinearFloat32(config.dim, frames * rows * columns * config.out_dim)

    def forward(self, x_BLD: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.float()[:, row] + e for row in range(2))
        return self.head(modulated_norm(x_BLD, shift, scale, self.eps))


class WanModel(nn.Module):
    """Predicts the flow (noise minus clean latents) of noisy video latents, given a text prompt."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        self.text_len = config.text_len
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(LinearFloat32(config.freq_dim, dim), nn.SiLU(), LinearFloat32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), LinearFloat32(dim, 6 * dim, pieces=6))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which is the one that the blocks compute in."""
        return self.patch_embedding.weight.dtype

    def forward(self, x: Tensor, t: Tensor, context: list[Tensor], y: Tensor | None = None) -> Tensor:
        """The flow, float32 [B, out_dim, F, H, W].

        x: latents [B, C, F, H, W], to which image-to-video models join y [B, C', F, H, W] on the channels.
        t: timesteps from 0 to 1000, [B], or [B, L] where they differ per token.
        context: a text embedding [n, text_dim] per sample, padded here with zeros to text_len.
        """
        latents_BCFHW = x if y is None else torch.cat([x, y], dim=1)
        assert latents_BCFHW.shape[1] == self.config.in_dim, (latents_BCFHW.shape, self.config.in_dim)
        grid = tuple(n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        freqs = rope_frequencies(self.config.dim // self.config.num_heads, grid, x.device)
        e, e0 = self.embed_time(t)
        context_BSD = self.embed_text(context)
        x_BLD = self.embed_patches(latents_BCFHW)
        for block in self.blocks:
            x_BLD = block(x_BLD, e0, freqs, context_BSD)
        return self.unpatchify(self.head(x_BLD, e), grid)

    def embed_patches(self, latents_BCFHW: Tensor) -> Tensor:
        p, q, r = self.config.patch_size
        # A convolution whose stride is its kernel is one matrix product, which every backend does fast in bf16.
        patches = rearrange(latents_BCFHW, "B C (f p) (h q) (w r) -> B (f h w) (C p q r)", p=p, q=q, r=r)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, T, D] for the head and [B, T, 6, D] for the blocks."""
        # Timesteps per token hold few different values, and the projection is 6*D wide.
        values, index = t.unique(return_inverse=True) if t.dim() == 2 else (t, None)
        e = self.time_embedding(sinusoidal_embedding(values, self.config.freq_dim))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        return (e.unsqueeze(1), e0.unsqueeze(1)) if index is None else (e[index], e0[index])

    def embed_text(self, context: list[Tensor]) -> Tensor:
        """[B, S, D]; the zeros that pad S are embedded too, since the model attends to them."""
        longest = max(len(tokens) for tokens in context)
        if longest > self.text_len:
            raise InputError(
                f"a prompt has {longest} tokens, but this model reads at most {self.text_len}: shorten the prompt"
            )
        padded = [F.pad(tokens.to(self.dtype), (0, 0, 0, self.text_len - len(tokens))) for tokens in context]
        return self.text_embedding(torch.stack(padded))

    def unpatchify(self, pixels_BLP: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (f, h, w), (p, q, r) = grid, self.config.patch_size
        return rearrange(pixels_BLP, "B (f h w) (p q r c) -> B c (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r)

"""The Wan 2.1 and 2.2 video transformer, with the parameter names of the original checkpoints.

Shapes: B batch, C latent channels, F H W latent frames/height/width, f h w the same in patches, L video tokens (f*h*w),
S text tokens, P picture tokens, D width, I width of the CLIP tokens, N heads, K head width. T is L where timesteps
differ per token, else 1. With timesteps per token, U of them differ, and the time path is computed for those alone.
No autocast: the dtype of the weights is the compute dtype; where float32 is needed, the cast is written out. In bf16
the residual stream is bf16, while norm statistics, modulation, gates, RoPE, the time path and the head are float32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs import WanConfig
from wan.errors import InputError
from wan.pointwise import PLAIN, Pointwise

_TOKENS_TOGETHER = 4096  # in the feed-forward, whose hidden values would otherwise be most of what a step holds
PICTURE_TOKENS = 257  # of CLIP: 16 x 16 patches and one for the whole picture


@dataclass(frozen=True, eq=False)
class TokenTimes:
    """Timesteps per token: the values, and which of them each token has. No search, so no wait for the device."""

    values_U: Tensor
    numbers_BL: Tensor  # int64

    @classmethod
    def found_in(cls, t_BL: Tensor) -> "TokenTimes":
        """Those of a plain tensor, each value once; on meta, where none can be seen, as many as clean frames give."""
        if t_BL.is_meta:
            return cls(t_BL.new_empty(len(t_BL) + 1), torch.empty_like(t_BL, dtype=torch.int64))
        return cls(*t_BL.unique(return_inverse=True))


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
        self.pointwise = PLAIN
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=config.eps) for _ in range(2))

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    def forward(self, x_BLD: Tensor, freqs: Tensor) -> Tensor:
        rms_norm, apply_rope = self.pointwise.rms_norm, self.pointwise.apply_rope
        q_BLNK = apply_rope(self.split_heads(rms_norm(self.norm_q, self.q(x_BLD))), freqs)
        k_BLNK = apply_rope(self.split_heads(rms_norm(self.norm_k, self.k(x_BLD))), freqs)
        v_BLNK = self.split_heads(self.v(x_BLD))
        return self.o(attention(q_BLNK, k_BLNK, v_BLNK))


class CrossAttention(Attention):
    """Attention to the text and, in models that read CLIP tokens, to the picture, each with a softmax of its own."""

    def __init__(self, config: WanConfig):
        super().__init__(config)
        if config.image_dim is not None:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(config.dim, eps=config.eps)

    def forward(self, x_BLD: Tensor, context_BSD: Tensor, picture_BPD: Tensor | None = None) -> Tensor:
        rms_norm = self.pointwise.rms_norm
        q_BLNK = self.split_heads(rms_norm(self.norm_q, self.q(x_BLD)))
        k_BSNK = self.split_heads(rms_norm(self.norm_k, self.k(context_BSD)))
        v_BSNK = self.split_heads(self.v(context_BSD))
        y_BLD = attention(q_BLNK, k_BSNK, v_BSNK)
        if picture_BPD is not None:
            k_BPNK = self.split_heads(rms_norm(self.norm_k_img, self.k_img(picture_BPD)))
            v_BPNK = self.split_heads(self.v_img(picture_BPD))
            y_BLD = y_BLD + attention(q_BLNK, k_BPNK, v_BPNK)
        return self.o(y_BLD)


class WanBlock(nn.Module):
    """One transformer block: modulated self-attention, cross-attention to text and picture, modulated feed-forward."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.pointwise = PLAIN
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x_BLD: Tensor,
        e0: Tensor,
        freqs: Tensor,
        context_BSD: Tensor,
        picture_BPD: Tensor | None = None,
        times_BL: Tensor | None = None,
    ) -> Tensor:
        """`e0` is float32 [B, 1, 6, D]: shift, scale, gate of the self-attention, then those of the feed-forward.

        With `times_BL`, it is [1, U, 6, D], and each token takes the row that its number in `times_BL` names.
        """

        attended_BLD = self.self_attn(self.modulated(x_BLD, e0, 0, times_BL), freqs)
        x_BLD = self.pointwise.gated_residual(x_BLD, attended_BLD, self.row(e0, 2), times_BL)
        del attended_BLD  # as large as x_BLD
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD), context_BSD, picture_BPD)
        parts = x_BLD.split(_TOKENS_TOGETHER, dim=1)
        times = [None] * len(parts) if times_BL is None else times_BL.split(_TOKENS_TOGETHER, dim=1)
        return torch.cat([self.feed_forward(*part, e0) for part in zip(parts, times, strict=True)], dim=1)

    def feed_forward(self, x_BLD: Tensor, times_BL: Tensor | None, e0: Tensor) -> Tensor:
        """Some of the tokens after their feed-forward; they do not depend on each other."""
        y_BLD = self.ffn(self.modulated(x_BLD, e0, 3, times_BL))
        return self.pointwise.gated_residual(x_BLD, y_BLD, self.row(e0, 5), times_BL)

    def modulated(self, x_BLD: Tensor, e0: Tensor, first: int, times_BL: Tensor | None) -> Tensor:
        """The norm of `x_BLD` with row number `first` as its shift and the next one as its scale, in x's dtype."""
        shift, scale = (self.row(e0, number) for number in (first, first + 1))
        return self.pointwise.modulated_norm(x_BLD, shift, scale, self.eps, times_BL, x_BLD.dtype)

    def row(self, e0: Tensor, number: int) -> Tensor:
        return self.modulation.float()[:, number] + e0[:, :, number]


class Head(nn.Module):
    """The last modulated norm, then the projection of every token to the pixels of its patch, in float32."""

    def __init__(self, config: WanConfig):
        super().__init__()
        frames, rows, columns = config.patch_size
        self.eps = config.eps
        self.pointwise = PLAIN
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = LinearFloat32(config.dim, frames * rows * columns * config.out_dim)

    def forward(self, x_BLD: Tensor, e: Tensor, times_BL: Tensor | None = None) -> Tensor:
        shift, scale = (self.modulation.float()[:, row] + e for row in range(2))
        return self.head(self.pointwise.modulated_norm(x_BLD, shift, scale, self.eps, times_BL))


class PictureEmbedding(nn.Module):
    """The CLIP tokens of the given pictures, brought to the transformer's width."""

    def __init__(self, config: WanConfig):
        super().__init__()
        wide, dim = config.image_dim, config.dim
        self.proj = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, dim), nn.LayerNorm(dim)
        )
        pictures = config.conditions.pictures
        self.emb_pos = nn.Parameter(torch.zeros(1, pictures * PICTURE_TOKENS, wide)) if pictures > 1 else None

    def forward(self, image_BPI: Tensor) -> Tensor:
        if self.emb_pos is not None:
            assert image_BPI.shape[1] == self.emb_pos.shape[1], (image_BPI.shape, self.emb_pos.shape)
            image_BPI = image_BPI + self.emb_pos
        return self.proj(image_BPI.to(self.proj[1].weight.dtype))


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
        self.img_emb = None if config.image_dim is None else PictureEmbedding(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which is the one that the blocks compute in."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor | TokenTimes,
        context: list[Tensor],
        y: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """The flow, float32 [B, out_dim, F, H, W].

        x: latents [B, C, F, H, W], to which image-to-video models join y [B, C', F, H, W] on the channels: 4 of mask,
        then the latents of a clip that holds the given pictures.
        t: timesteps from 0 to 1000, [B], or [B, L] where they differ per token, or these as TokenTimes.
        context: a text embedding [n, text_dim] per sample, padded here with zeros to text_len.
        image_embeds: the CLIP tokens [B, P, image_dim] of the given picture, or of the first and then the last one.
        """
        latents_BCFHW = x if y is None else torch.cat([x, y], dim=1)
        assert latents_BCFHW.shape[1] == self.config.in_dim, (latents_BCFHW.shape, self.config.in_dim)
        assert (image_embeds is None) == (self.img_emb is None), "CLIP tokens go to models with img_emb, and only there"
        grid = tuple(n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        freqs = rope_frequencies(self.config.dim // self.config.num_heads, grid, x.device)
        e, e0, times_BL = self.embed_time(t)
        context_BSD = self.embed_text(context)
        picture_BPD = None if image_embeds is None else self.img_emb(image_embeds)
        x_BLD = self.embed_patches(latents_BCFHW)
        for block in self.blocks:
            x_BLD = block(x_BLD, e0, freqs, context_BSD, picture_BPD, times_BL)
        return self.unpatchify(self.head(x_BLD, e, times_BL), grid)

    def embed_patches(self, latents_BCFHW: Tensor) -> Tensor:
        p, q, r = self.config.patch_size
        # A convolution whose stride is its kernel is one matrix product, which every backend does fast in bf16.
        patches = rearrange(latents_BCFHW, "B C (f p) (h q) (w r) -> B (f h w) (C p q r)", p=p, q=q, r=r)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)

    def embed_time(self, t: Tensor | TokenTimes) -> tuple[Tensor, Tensor, Tensor | None]:
        """float32 [B, 1, D] for the head and [B, 1, 6, D] for the blocks.

        Of timesteps per token, [1, U, D], [1, U, 6, D] and the number [B, L] of each token's own: there are few
        different ones, and rows for every token would take six times the memory of x_BLD in float32.
        """
        if isinstance(t, Tensor) and t.dim() == 2:
            t = TokenTimes.found_in(t)
        values, times_BL = (t, None) if isinstance(t, Tensor) else (t.values_U, t.numbers_BL)
        e = self.time_embedding(sinusoidal_embedding(values, self.config.freq_dim))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        axis = 1 if times_BL is None else 0
        return e.unsqueeze(axis), e0.unsqueeze(axis), times_BL

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


def use_pointwise(module: nn.Module, pointwise: Pointwise) -> None:
    """Has a model, or a part of one, compute its pointwise functions with these; PLAIN undoes it."""
    for part in module.modules():
        if isinstance(part, Attention | WanBlock | Head):
            part.pointwise = pointwise

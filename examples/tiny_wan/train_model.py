"""Trains the tiny Wan transformer together with its UMT5 text encoder on the latents of named emoji.

Shapes: N samples, C latent channels, F H W latent frames/height/width, S text tokens, D text width.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from emoji_pictures import MOTIONS, Emoji, moving, on_white
from original_names import original_text_names
from safetensors.torch import load_file, save_file
from suggest_settings import TINY_WAN
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from wan.configs import WanConfig
from wan.model import WanModel
from wan.text_encoder import transformers_name
from wan.vae import WanVAE, load_vae

CONFIG = WanConfig(
    "t2v",
    dim=160,
    ffn_dim=640,
    num_heads=4,
    num_layers=6,
    in_dim=16,
    out_dim=16,
    text_dim=128,
    freq_dim=64,
    text_len=32,
)
BATCH = 48
LEARNING_RATE = 1.5e-3
SHIFT = 3.0
UNCONDITIONAL = 0.08  # share of captions that are emptied, so that guidance has something to push away from
CLIP_EVERY = 12
CLIPS = 320
PIECES = 1400


def train_model(known: Emoji, folder: Path, minutes: float, go_on: bool, seed: int = 0) -> None:
    """Trains for about `minutes` and writes the transformer, the text encoder (both bf16) and the tokenizer.

    `go_on` starts from the files that are there, with a new optimizer and schedule.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    pieces = folder / "google" / "umt5-xxl" / "spiece.model"
    if not go_on:
        _train_tokenizer(known, pieces)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(pieces), add_eos=True)
    vae = load_vae(folder / "tiny_wan_vae.safetensors", torch.float32, "cpu")
    pictures = _encode_pictures(vae, known)
    clips, clip_names = _encode_clips(vae, known, draw)
    model, text_encoder = _new_model(), _new_text_encoder(tokenizer.vocab_size())
    if go_on:
        _load(model, text_encoder, folder)
    ids = {text: tokenizer.encode(text) for text in [*known.names, *clip_names, ""]}
    parameters = [*model.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, step, progress, recent = time.monotonic(), 0, 0.0, 0.0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 200) * _cosine(progress)
        if step % CLIP_EVERY == CLIP_EVERY - 1:
            latents, names = _draw(clips, clip_names, BATCH // 3, draw)
        else:
            latents, names = _draw(pictures, known.names, BATCH, draw)
        loss = _flow_loss(model, _encode_names(text_encoder, ids, names, draw), latents, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.99 * recent + 0.01 * loss.item()
        step, progress = step + 1, (time.monotonic() - start) / (60 * minutes)
        if step % 100 == 0:
            print(f"{step} steps, {progress:.1%}, loss {recent:.4f}", flush=True)
        if step % 1000 == 0:
            _save(model, text_encoder, folder)
    _save(model, text_encoder, folder)


def _train_tokenizer(known: Emoji, path: Path) -> None:
    """A SentencePiece model with UMT5's special ids; digits and letters are pieces of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = [*known.names, *(f"{name} {motion}" for name in known.names[:200] for motion in MOTIONS)]
    characters = [f"character{digit}" for digit in range(10)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions + characters * 3),
        model_prefix=str(path.with_suffix("")),
        vocab_size=PIECES,
        hard_vocab_limit=False,
        model_type="unigram",
        split_digits=True,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-'",
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


@torch.no_grad()
def _encode_pictures(vae: WanVAE, known: Emoji) -> Tensor:
    return torch.cat([vae.encode(chunk[:, :, None]) for chunk in on_white(known.rgba_NCHW).split(64)])


@torch.no_grad()
def _encode_clips(vae: WanVAE, known: Emoji, draw: torch.Generator) -> tuple[Tensor, list[str]]:
    rows = torch.randint(len(known.names), (CLIPS,), generator=draw).tolist()
    motions = [MOTIONS[i] for i in torch.randint(len(MOTIONS), (CLIPS,), generator=draw)]
    clips_NCTHW = moving(on_white(known.rgba_NCHW[rows]), motions, 5)
    latents = torch.cat([vae.encode(chunk) for chunk in clips_NCTHW.split(32)])
    return latents, [f"{known.names[row]} {motion}" for row, motion in zip(rows, motions, strict=True)]


def _new_model() -> WanModel:
    """Wan's own initialisation: Xavier, small embeddings, a head that starts at zero."""
    model = WanModel(CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.view(CONFIG.dim, -1))
    for embedding in (model.text_embedding, model.time_embedding):
        for linear in (embedding[0], embedding[2]):
            nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    return model.train()


def _new_text_encoder(pieces: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=pieces,
        d_model=CONFIG.text_dim,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).train()


def _load(model: WanModel, text_encoder: UMT5EncoderModel, folder: Path) -> None:
    model.load_state_dict(load_file(folder / "tiny_wan_t2v.safetensors"))
    stored = load_file(folder / "models_t5_tiny.safetensors")
    text_encoder.load_state_dict({transformers_name(name): tensor for name, tensor in stored.items()}, strict=False)
    text_encoder.tie_weights()


def _cosine(progress: float) -> float:
    return max(0.5 * (1 + math.cos(math.pi * min(progress, 1.0))), 0.005)


def _draw(latents: Tensor, names, count: int, draw: torch.Generator) -> tuple[Tensor, list[str]]:
    rows = torch.randint(len(names), (count,), generator=draw).tolist()
    return latents[rows], [names[row] for row in rows]


def _encode_names(
    text_encoder: UMT5EncoderModel, ids: dict[str, list[int]], names: list[str], draw: torch.Generator
) -> list[Tensor]:
    """What the model gets in use: each prompt's embedding [S, D] without its padding."""
    emptied = torch.rand(len(names), generator=draw) < UNCONDITIONAL
    tokens = [ids["" if empty else name] for name, empty in zip(names, emptied.tolist(), strict=True)]
    longest = max(len(prompt) for prompt in tokens)
    ids_NS = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in tokens])
    mask_NS = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in tokens])
    encoded_NSD = text_encoder(input_ids=ids_NS, attention_mask=mask_NS).last_hidden_state
    return [encoded[: len(prompt)] for encoded, prompt in zip(encoded_NSD, tokens, strict=True)]


def _flow_loss(model: WanModel, context: list[Tensor], latents_NCFHW: Tensor, draw: torch.Generator) -> Tensor:
    """Rectified flow: x = (1 - s) x0 + s noise, the model gets 1000 s and predicts noise - x0."""
    u_N = torch.rand(len(latents_NCFHW), generator=draw)
    sigma_N = SHIFT * u_N / (1 + (SHIFT - 1) * u_N)
    noise = torch.randn(latents_NCFHW.shape, generator=draw)
    sigma = sigma_N[:, None, None, None, None]
    flow = model((1 - sigma) * latents_NCFHW + sigma * noise, 1000 * sigma_N, context)
    return F.mse_loss(flow, noise - latents_NCFHW)


def _save(model: WanModel, text_encoder: UMT5EncoderModel, folder: Path) -> None:
    metadata = {name: str(asdict(CONFIG)[name]) for name in ("num_heads", "text_len")}
    metadata |= TINY_WAN  # how to sample
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "tiny_wan_t2v.safetensors", metadata=metadata)
    text = {name: tensor.to(torch.bfloat16) for name, tensor in text_encoder.state_dict().items()}
    text_metadata = {"text_len": str(CONFIG.text_len)}
    save_file(original_text_names(text), folder / "models_t5_tiny.safetensors", metadata=text_metadata)

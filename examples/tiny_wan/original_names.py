"""Tiny models' weights under the names that Wan's own files use."""

import re
from collections.abc import Mapping

import torch

_VAE_RULES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.norm1\.", ".residual.0."),
    (r"(middle\.\d|resnets\.\d+|down_blocks\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.down_blocks\.", ".downsamples."),
)

_TEXT_RULES = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)


def original_vae_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' AutoencoderKLWan weights, named as in Wan2.1_VAE.pth."""
    return {_rename(_flat_upsample(name), _VAE_RULES): tensor for name, tensor in weights.items()}


def original_text_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' UMT5EncoderModel weights, named as in models_t5_umt5-xxl-enc-bf16.pth."""
    weights = {name: tensor for name, tensor in weights.items() if name != "encoder.embed_tokens.weight"}
    return {_rename(name, _TEXT_RULES): tensor for name, tensor in weights.items()}


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _flat_upsample(name: str) -> str:
    """decoder.up_blocks.B.resnets.R is upsamples.(4 B + R); a block's upsampler is its fourth entry."""
    match = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.(.*)", name)
    if match is None:
        return name
    block, _, resnet, rest = match.groups()
    rest = re.sub(r"^conv1\.", "residual.2.", rest)
    return f"decoder.upsamples.{4 * int(block) + (int(resnet) if resnet else 3)}.{rest}"

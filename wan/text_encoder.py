"""The UMT5 text encoder of Wan: prompts to embeddings.

B batch, L tokens of a padded batch, n tokens of one prompt, D width.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.errors import InputError
from wan.float8 import FLOAT8, RoundedLinear, check_float8, round_matrix
from wan.memory import available_bytes, check_room, free_device_bytes
from wan.state_dict_files import load_model, read_state_dict, strip_prefix
from wan.tokenizer import clean_prompt, open_tokenizer, read_tokenizer, tokenizer_file
from wan.values import Number

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

TEXT_LEN = 512
_TEXT_LENGTHS = Number(1, 100_000, whole=True)

_COMFY_PREFIX = "text_encoders.umt5xxl.transformer."
_BLOCK = "encoder.block.0.layer."

_RENAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)

# Older and newer ComfyUI files name the same things differently; the input scales only serve fp8 matrix products.
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_UNUSED_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


class TextEncoder:
    """A loaded UMT5 encoder with its tokenizer, which is looked for when text is first encoded."""

    def __init__(
        self, model: "UMT5EncoderModel", path: Path, tokenizer: Path | None, embedded: bytes | None, text_len: int
    ):
        self.model = model
        self.text_len = text_len
        self._path, self._tokenizer, self._embedded = path, tokenizer, embedded

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str | torch.device) -> "TextEncoder":
        """Itself, moved to `device`."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode_ids(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Embeddings [B, L, D] of token ids; rows where the mask is 0 are padding and mean nothing."""
        return self.model(ids_BL.to(self.device), attention_mask=mask_BL.to(self.device)).last_hidden_state

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """One embedding [n, D] per prompt, cut to its own tokens, </s> included; at most text_len of them."""
        if not prompts:
            return []
        rows = [self.tokenize(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        # UMT5 pads with 0.
        ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask_BL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        embeddings_BLD = self.encode_ids(ids_BL, mask_BL)
        return [embedding_LD[: len(row)].clone() for row, embedding_LD in zip(rows, embeddings_BLD, strict=True)]

    def tokenize(self, prompt: str) -> list[int]:
        """The token ids of one prompt, cleaned as Wan does it, ending with </s>; at most text_len of them.

        InputError if no tokenizer can be found.
        """
        *ids, end = self._text_to_ids(clean_prompt(prompt))
        return [*ids[: self.text_len - 1], end]

    def count_tokens(self, prompt: str) -> int:
        """How many tokens the prompt has before it is cut."""
        return len(self._text_to_ids(clean_prompt(prompt)))

    @cached_property
    def _text_to_ids(self):
        vocab_size = self.model.config.vocab_size
        if self._tokenizer is not None:
            return read_tokenizer(self._tokenizer, vocab_size)
        return open_tokenizer(self._path, self._embedded, vocab_size)


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    text_len: int | None = None,
    text_dim: int | None = None,
    fp8: bool = False,
) -> TextEncoder:
    """The UMT5 encoder of a file with Wan's names (.pth, .safetensors) or ComfyUI's, also its scaled fp8.

    `tokenizer`: a tokenizer.json, a spiece.model or a folder with one; None looks beside the file, in it, on the hub.
    `text_len`: the most tokens of a prompt; None takes the file's metadata, else 512. `text_dim`: the width that the
    transformer expects. With `fp8` the linear layers' weights stay in float8, with a scale for each row, or as an fp8
    file has them. InputError for a file that is missing, truncated, contains code, is not UMT5, or has another width,
    for float16, and if there is not enough memory.
    """
    if dtype == torch.float16:
        raise InputError("UMT5 overflows in float16: use bfloat16 or float32 (a float16 file can be loaded that way)")
    chosen = None if tokenizer is None else tokenizer_file(tokenizer)
    stored, metadata = read_state_dict(path, "text encoder")
    text_len = _text_len(metadata, path) if text_len is None else text_len
    embedded = next((value for name, value in stored.items() if name.split(".")[-1] == "spiece_model"), None)
    source = f"{path} is not a UMT5 encoder"
    tensors = _transformers_names(stored, source)
    if fp8:
        check_float8(torch.device(device))
    _check_room(tensors, dtype, torch.device(device), path, fp8)
    weights, scales = _weights_and_scales(tensors, path)
    sizes = _sizes(weights, source)
    from transformers import UMT5Config, UMT5EncoderModel  # here, because it takes seconds

    if text_dim not in (None, sizes["d_model"]):
        raise InputError(
            f"{path} gives embeddings of width {sizes['d_model']}, the transformer expects {text_dim}: use the "
            "text encoder of its release"
        )
    config = UMT5Config(**sizes, feed_forward_proj="gated-gelu")
    rounded = {
        name: _rounded(weights.pop(name), scales.pop(name, None), dtype, device) for name in _linears(weights, fp8)
    }
    tensors = _dequantised(weights, scales, dtype, device)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    model = load_model(lambda: _with_rounded(UMT5EncoderModel(config), rounded), tensors, dtype, device, source)
    model.tie_weights()
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    return TextEncoder(
        model,
        path=Path(path),
        tokenizer=chosen,
        embedded=None if embedded is None else embedded.numpy().tobytes(),
        text_len=text_len,
    )


def _text_len(metadata: Mapping[str, str], path: str | Path) -> int:
    try:
        return _TEXT_LENGTHS(metadata.get("text_len", TEXT_LEN))
    except ValueError as error:
        raise InputError(f"{path}: text_len in its metadata {error}") from None


def transformers_name(name: str) -> str:
    """The name in transformers' UMT5EncoderModel of a parameter of Wan's own encoder; plain renames, one to one."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _transformers_names(stored: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    tensors = strip_prefix(stored, (_COMFY_PREFIX,))
    if "encoder.token_embedding.weight" in tensors:  # Wan's names out of a whole T5
        tensors = strip_prefix(tensors, ("encoder.",))
    dropped = ("spiece_model", "encoder.embed_tokens.weight")
    renamed = {transformers_name(name): tensor for name, tensor in tensors.items() if name not in dropped}
    if "shared.weight" not in renamed:
        raise InputError(f"{source}: it contains neither token_embedding.weight nor shared.weight")
    return renamed


def _check_room(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, path: str | Path, fp8: bool
) -> None:
    """InputError if the memory is too small: 11 GB for UMT5-XXL, 7 GB with `fp8`.

    A CPU reads weights in place that are stored in `dtype`.
    """
    unused, rounded = (*_SCALE_SUFFIXES, *_UNUSED_SUFFIXES), _linears(tensors, fp8)
    weights = [tensor for name, tensor in tensors.items() if not name.endswith(unused) and name not in rounded]
    if device.type == "cpu":
        copied = sum(tensor.numel() * dtype.itemsize for tensor in weights if tensor.dtype != dtype)
        copied += sum(tensors[name].numel() for name in rounded if tensors[name].dtype != FLOAT8)
        advice = f"use the {str(dtype).removeprefix('torch.')} file of the text encoder, which is read in place"
        check_room({f"the text encoder {path}": copied}, available_bytes(), "RAM", advice)
    else:
        needed = sum(tensor.numel() * dtype.itemsize for tensor in weights) + sum(tensors[n].numel() for n in rounded)
        advice = "close other programs that use the device; caching and generating also work with --device cpu"
        advice = advice if fp8 else f"use --fp8_t5, or {advice}"
        check_room({f"the text encoder {path}": needed}, free_device_bytes(device), f"memory on {device}", advice)


def _weights_and_scales(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights as they are stored, and the scales of those that are scaled, both by the weight's name."""
    scales = {}
    for suffix in _SCALE_SUFFIXES:
        found = {name.removesuffix(suffix): value for name, value in tensors.items() if name.endswith(suffix)}
        scales |= {f"{name}.weight": value for name, value in found.items()}
    unused = (*_SCALE_SUFFIXES, *_UNUSED_SUFFIXES)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(unused)}
    for name, tensor in weights.items():
        scale = scales.get(name)
        if not tensor.is_floating_point() or (scale is not None and scale.numel() != 1):
            raise InputError(f"{path}: {name} is quantised in a way that is not supported; use a bf16 or fp8 file")
    return weights, scales


def _dequantised(
    weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """The weights, scaled ones multiplied by their scale, in `dtype` and on `device` where scaled."""
    return {
        name: (tensor.to(device).float() * scales[name].to(device).float()).to(dtype) if name in scales else tensor
        for name, tensor in weights.items()
    }


def _linears(tensors: Mapping[str, Tensor], fp8: bool) -> list[str]:
    """The names of the weights that are kept in float8: those of linear layers."""
    layers = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight")
    return [name for name in tensors if fp8 and layers.fullmatch(name)]


def _rounded(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, device: str | torch.device) -> RoundedLinear:
    """A layer with this weight, which has no other copy in memory unless it is stored in an unusual float8."""
    if weight.dtype == FLOAT8:
        one = torch.ones(()) if scale is None else scale
        return RoundedLinear(weight.to(device), one.float().to(device).reshape(1, 1).expand(len(weight), 1), dtype)
    values = weight if scale is None else weight.float() * scale.float()
    rounded = torch.empty(weight.shape, dtype=FLOAT8)
    scales = round_matrix(values, rounded, scaled=True)
    return RoundedLinear(rounded.to(device), scales.to(device), dtype)


def _with_rounded(model: "UMT5EncoderModel", rounded: Mapping[str, RoundedLinear]) -> "UMT5EncoderModel":
    """The model with these layers in the place of its own of the same shape."""
    for name, layer in rounded.items():
        own = name.removesuffix(".weight")
        if own in dict(model.named_modules()) and model.get_submodule(own).weight.shape == layer.rounded.shape:
            model.set_submodule(own, layer)
    return model


def _sizes(tensors: Mapping[str, Tensor], source: str) -> dict[str, int]:
    """The encoder's sizes by UMT5Config's names, read from its shapes; the relative bias has one column per head."""
    bias, query = (_BLOCK + f"0.SelfAttention.{name}.weight" for name in ("relative_attention_bias", "q"))
    gate = _BLOCK + "1.DenseReluDense.wi_0.weight"
    for name in (bias, query, gate):
        if name not in tensors:
            raise InputError(f"{source}: it does not contain {name}")
    vocab_size, d_model = tensors["shared.weight"].shape
    buckets, heads = tensors[bias].shape
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": tensors[query].shape[0] // heads,
        "d_ff": tensors[gate].shape[0],
        "num_heads": heads,
        "num_layers": sum(name.endswith(".SelfAttention.q.weight") for name in tensors),
        "relative_attention_num_buckets": buckets,
    }

"""The UMT5 encoder against the official one's output, its file formats, and its tokenizers against SentencePiece."""

import io
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import tokenizers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from wan.errors import InputError
from wan.float8 import rounded_tensors
from wan.text_encoder import load_text_encoder, transformers_name
from wan.tokenizer import clean_prompt

ORACLE = Path(__file__).parent / "oracle" / "umt5_encoder.safetensors"
SENTENCE = "a red cat and the blue dog sit in one modern restaurant at night wearing an elegant dress"
PROMPTS = ["a red cat", "", "The DOG-sits!  at night", "naïve café", "一只红色的猫", "😀 cat 🐈‍⬛ dress", "\u0416 qqq"]


@pytest.fixture(scope="module")
def oracle():
    return load_file(ORACLE)


@pytest.fixture(scope="module")
def weights(oracle):
    return {name.removeprefix("weight."): oracle[name] for name in oracle if name.startswith("weight.")}


@pytest.fixture(scope="module")
def spiece():
    """A SentencePiece model like UMT5's: pad 0, end 1, start 2, unknown 3, byte fallback."""
    model = io.BytesIO()
    words = SENTENCE.split()
    sentences = (" ".join(words[i:] + words[:i]) for i in range(len(words)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=400, hard_vocab_limit=False, model_type="unigram",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer_json(spiece):
    """The same tokenizer in the other format."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.enable_padding(length=16)
    backend.enable_truncation(4)
    return backend.to_str()


@pytest.fixture(scope="module")
def big_weights(weights):
    """The oracle's encoder with a vocabulary that is large enough for the tokenizer."""
    return {**weights, "token_embedding.weight": torch.randn(512, 48, generator=torch.Generator().manual_seed(0))}


def expected_ids(spiece, prompt):
    reference = sentencepiece.SentencePieceProcessor(model_proto=spiece, add_eos=True)
    return reference.encode(clean_prompt(prompt))


def comfy(weights, spiece=b"", prefix=""):
    named = {prefix + transformers_name(name): tensor for name, tensor in weights.items()}
    embedded = torch.frombuffer(bytearray(spiece), dtype=torch.uint8) if spiece else None
    return named | ({"spiece_model": embedded} if spiece else {})


def scaled_fp8(tensors, scale_name):
    scaled = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        scaled[name] = tensor
        if ("SelfAttention." in name or "DenseReluDense" in name) and "_bias" not in name:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + scale_name] = scale
    return scaled


def save(tensors, path, **metadata):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def relative(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


FORMATS = {
    "wan.pth": lambda weights: weights,
    "wan.safetensors": lambda weights: weights,
    "whole_t5.pth": lambda weights: {f"encoder.{name}": tensor for name, tensor in weights.items()},
    "comfy.safetensors": lambda weights: comfy(weights, b"not read yet"),
    "all_in_one.safetensors": lambda weights: {
        **comfy(weights, prefix="text_encoders.umt5xxl.transformer."),
        "model.diffusion_model.head.modulation": torch.zeros(1, 2, 8),
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_output_is_the_official_one_from_every_format(oracle, weights, tmp_path, name):
    encoder = load_text_encoder(save(FORMATS[name](weights), tmp_path / name), dtype=torch.float32)
    output = encoder.encode_ids(oracle["input.ids"], oracle["input.mask"])
    real = oracle["input.mask"].bool()
    assert not real.all()
    assert relative(output[real], oracle["output"][real]) < 1e-5


def test_bfloat16_is_the_default_and_close(oracle, weights, tmp_path):
    encoder = load_text_encoder(save(weights, tmp_path / "t5.pth"))
    real = oracle["input.mask"].bool()
    output = encoder.encode_ids(oracle["input.ids"], oracle["input.mask"])
    assert encoder.dtype == output.dtype == torch.bfloat16
    assert torch.equal(encoder.model.shared.weight, weights["token_embedding.weight"].bfloat16())
    assert relative(output[real], oracle["output"][real]) < 0.1


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_dequantised(weights, tmp_path, scale_name):
    stored = scaled_fp8(comfy(weights), scale_name)
    loaded = load_text_encoder(save(stored, tmp_path / "t5.safetensors"), dtype=torch.float32).model.state_dict()
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == 1 + 3 * 7
    for name, tensor in comfy(weights).items():
        scale = stored.get(name.removesuffix("weight") + scale_name)
        wanted = tensor if scale is None else stored[name].float() * scale
        assert torch.equal(loaded[name], wanted)
        assert relative(loaded[name], tensor) < 0.05


def test_block_scales_are_refused_not_misread(weights, tmp_path):
    name = "encoder.block.0.layer.0.SelfAttention.q."
    stored = {**scaled_fp8(comfy(weights), "weight_scale"), name + "weight_scale": torch.ones(48, 3)}
    with pytest.raises(InputError, match="quantised"):
        load_text_encoder(save(stored, tmp_path / "t5.safetensors"))


def test_embedding_is_tied_also_after_moving(weights, tmp_path):
    model = load_text_encoder(save(weights, tmp_path / "t5.pth")).to("cpu").model
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_every_name_of_the_full_encoder_is_taken():
    parts = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding", "norm2", "ffn.gate.0")
    names = [f"blocks.{i}.{part}.weight" for i in range(24) for part in (*parts, "ffn.fc1", "ffn.fc2")]
    names += ["token_embedding.weight", "norm.weight"]
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(num_layers=24, feed_forward_proj="gated-gelu"))
    wanted = set(model.state_dict()) - {"encoder.embed_tokens.weight"}
    assert len(names) == 242 and {transformers_name(name) for name in names} == wanted


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "where", ["json", "json folder", "model", "beside json", "beside model", "wan folder", "in", "all in one"]
)
def test_tokens_are_those_of_sentencepiece(big_weights, spiece, tokenizer_json, tmp_path, where, prompt):
    beside = "google/umt5-xxl" if where == "wan folder" else "."
    (tmp_path / "tok").mkdir()
    folder = tmp_path / beside if where in ("beside json", "beside model", "wan folder") else tmp_path / "tok"
    folder.mkdir(parents=True, exist_ok=True)
    if "json" in where or where == "wan folder":
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if "model" in where:
        (folder / "spiece.model").write_bytes(spiece)
    chosen = {"json": folder / "tokenizer.json", "json folder": folder, "model": folder / "spiece.model"}.get(where)
    stored = comfy(big_weights, spiece if where in ("in", "all in one") else b"")
    if where == "all in one":
        inner = {name: "text_encoders." + ("" if name == "spiece_model" else "umt5xxl.transformer.") for name in stored}
        stored = {inner[name] + name: tensor for name, tensor in stored.items()}
    encoder = load_text_encoder(save(stored, tmp_path / "t5.safetensors"), tokenizer=chosen)
    assert encoder.tokenize(prompt) == expected_ids(spiece, prompt)


def test_unknown_characters_become_bytes(big_weights, spiece, tmp_path):
    encoder = load_text_encoder(save(comfy(big_weights, spiece), tmp_path / "t5.safetensors"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    assert [pieces.id_to_piece(i) for i in encoder.tokenize("猫")][1:] == ["<0xE7>", "<0x8C>", "<0xAB>", "</s>"]


def test_prompts_are_trimmed_to_their_tokens_and_independent_of_the_batch(big_weights, spiece, tmp_path):
    encoder = load_text_encoder(save(comfy(big_weights, spiece), tmp_path / "t5.safetensors"), dtype=torch.float32)
    together = encoder(PROMPTS)
    for prompt, embedding in zip(PROMPTS, together, strict=True):
        assert embedding.shape == (len(expected_ids(spiece, prompt)), 48)
        torch.testing.assert_close(embedding, encoder([prompt])[0], rtol=1e-4, atol=1e-5)
    assert encoder([]) == [] and encoder([""])[0].shape == (1, 48)


@pytest.mark.parametrize("text", ["many", "0", "-1", "1e9", "9" * 5000, "nan", ""])
def test_a_text_length_in_the_metadata_that_cannot_be_is_refused(big_weights, tmp_path, text):
    save_file(big_weights, tmp_path / "t5.safetensors", {"text_len": text})
    with pytest.raises(InputError, match="text_len in its metadata must be a whole number from 1"):
        load_text_encoder(tmp_path / "t5.safetensors")


LENGTHS = [({}, None, 512), ({}, 7, 7), ({"text_len": "9"}, None, 9), ({"text_len": "9"}, 7, 7)]


@pytest.mark.parametrize(("metadata", "argument", "length"), LENGTHS)
def test_long_prompts_end_at_text_len_with_the_end_token(big_weights, spiece, tmp_path, metadata, argument, length):
    path = save(comfy(big_weights, spiece), tmp_path / "t5.safetensors", **metadata)
    encoder = load_text_encoder(path, text_len=argument)
    prompt = "cat " * 600
    assert encoder.tokenize(prompt) == [*expected_ids(spiece, prompt)[: length - 1], 1]


def test_prompts_are_cleaned_as_wan_does():
    assert clean_prompt("  a &amp;lt;b&amp;gt;\t\n  CafÃ© \u3000 x ") == "a <b> Café x"
    assert clean_prompt("<i> &amp;amp; &amp;amp;amp;") == "<i> & &amp;"  # ftfy leaves entities alone beside a tag


def test_the_hub_is_asked_last_and_only_when_text_is_encoded(big_weights, tmp_path, monkeypatch):
    def offline(*_):
        raise LocalEntryNotFoundError("cannot reach the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    encoder = load_text_encoder(save(big_weights, tmp_path / "t5.pth"))
    encoder.encode_ids(torch.tensor([[5, 1]]), torch.ones(1, 2))
    with pytest.raises(InputError, match="--tokenizer") as error:
        encoder(["a cat"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", json.dumps({"model": 3}).encode(), b"\xff\xfe"])
@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_broken_tokenizers_are_one_clear_line(big_weights, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    encoder = load_text_encoder(save(big_weights, tmp_path / "t5.pth"), tokenizer=tmp_path / name)
    with pytest.raises(InputError, match=name):
        encoder(["a cat"])


def test_a_tokenizer_of_another_encoder_is_refused(weights, spiece, tmp_path):
    small = {**weights, "token_embedding.weight": weights["token_embedding.weight"][:200]}
    encoder = load_text_encoder(save(comfy(small, spiece), tmp_path / "t5.safetensors"))
    with pytest.raises(InputError, match="200"):
        encoder(["a cat"])


def test_a_missing_tokenizer_is_noticed_before_the_model_loads(tmp_path):
    with pytest.raises(InputError, match="--tokenizer"):
        load_text_encoder(tmp_path / "no_such_encoder.pth", tokenizer=tmp_path / "nowhere")


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: {"decoder.head.0.gamma": torch.zeros(3)}, "not a UMT5 encoder"),
        (without("blocks.0.attn.q.weight"), "not a UMT5 encoder"),
        (without("blocks.1.pos_embedding.embedding.weight"), "lacks tensors"),
        (lambda weights: {**weights, "more": torch.zeros(1)}, "unknown tensors: more"),
        (lambda weights: {**weights, "norm.weight": torch.zeros(47)}, "misshapen"),
        (lambda weights: {**weights, "norm.weight": torch.zeros(48, dtype=torch.int8)}, "quantised"),
    ],
)
def test_other_files_are_refused(weights, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        load_text_encoder(save(change(weights), tmp_path / "t5.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_and_missing_files_are_one_clear_line(weights, tmp_path, suffix):
    whole = save(weights, tmp_path / f"whole{suffix}")
    cut = Path(shutil.copy(whole, tmp_path / f"cut{suffix}"))
    cut.write_bytes(whole.read_bytes()[:-500])
    for path in (cut, tmp_path / f"missing{suffix}", tmp_path):
        with pytest.raises(InputError) as error:
            load_text_encoder(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_float16_is_refused(tmp_path):
    with pytest.raises(InputError, match="bfloat16"):
        load_text_encoder(tmp_path / "t5.pth", dtype=torch.float16)


# ---- in float8


def linear_names(weights):
    return [name for name in weights if name.startswith("blocks.") and (".attn." in name or ".ffn." in name)]


def in_rows(tensor):
    """What float8 with a scale for each row makes of a matrix."""
    scale = tensor.float().abs().amax(1, keepdim=True) / 448
    return ((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_fp8_it_computes_with_the_rounded_weights(oracle, weights, tmp_path, dtype):
    rounded = {**weights, **{name: in_rows(weights[name]) for name in linear_names(weights)}}
    expected = load_text_encoder(save(rounded, tmp_path / "rounded.pth"), dtype=dtype)
    encoder = load_text_encoder(save(weights, tmp_path / "t5.pth"), dtype=dtype, fp8=True)
    outputs = [own.encode_ids(oracle["input.ids"], oracle["input.mask"]) for own in (encoder, expected)]
    assert torch.equal(*outputs) and encoder.dtype == outputs[0].dtype == dtype
    exact = load_text_encoder(tmp_path / "t5.pth", dtype=dtype).encode_ids(oracle["input.ids"], oracle["input.mask"])
    real = oracle["input.mask"].bool()
    assert 0 < relative(outputs[0][real], exact[real]) < 0.5  # of random weights, which amplify errors


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_in_fp8_an_fp8_file_keeps_its_own_values(oracle, weights, tmp_path, scale_name):
    path = save(scaled_fp8(comfy(weights), scale_name), tmp_path / "t5.safetensors")
    inputs = oracle["input.ids"], oracle["input.mask"]
    outputs = [load_text_encoder(path, dtype=torch.float32, fp8=fp8).encode_ids(*inputs) for fp8 in (True, False)]
    assert torch.equal(*outputs)


def test_in_fp8_linear_weights_take_a_byte_a_value(weights, tmp_path):
    encoder = load_text_encoder(save(weights, tmp_path / "t5.pth"), fp8=True)
    values = sum(weights[name].numel() for name in linear_names(weights))
    rows = sum(len(weights[name]) for name in linear_names(weights))
    others = sum(tensor.numel() for tensor in weights.values()) - values
    tensors = [*encoder.model.state_dict().values(), *rounded_tensors(encoder.model)]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    assert len(linear_names(weights)) > 10 and sum(held.values()) == values + 4 * rows + 2 * others


def test_what_is_not_a_umt5_is_told_in_fp8_as_ever(weights, tmp_path):
    name = linear_names(weights)[-1]
    lacking = {own: tensor for own, tensor in weights.items() if own != name}
    for given in (lacking, {**weights, name: weights[name][1:]}):
        with pytest.raises(InputError, match="lacks tensors"):
            load_text_encoder(save(given, tmp_path / "t5.pth"), fp8=True)

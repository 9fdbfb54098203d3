"""Loading transformers: every layout that users have, and one clear line for everything else."""

import json
import struct
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import RELEASED, RELEASED_NAMES

from wan.configs import TASKS, WanConfig
from wan.errors import InputError
from wan.loading import (
    CheckpointHeader,
    check_fits_task,
    config_from_header,
    file_dtype,
    is_fp8,
    load_dit,
    read_checkpoint_header,
)
from wan.model import WanModel
from wan.safetensors_header import TensorEntry, read_bytes, read_file_header
from wan.stored_tensors import DTYPES, read_tensor

TINY = WanConfig(
    "t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=2, in_dim=4, out_dim=4, text_dim=8, freq_dim=8, text_len=6
)
METADATA = {"num_heads": "1", "text_len": "6"}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    return {name: tensor.detach().clone() for name, tensor in WanModel(TINY).state_dict().items()}


def write(path: Path, weights: Weights, prefix: str = "", metadata: dict | None = METADATA) -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata)
    return path


def write_shards(folder: Path, weights: Weights) -> list[Path]:
    names = sorted(weights)
    parts = [names[:20], names[20:50], names[50:]]
    paths = [folder / f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for path, part in zip(paths, parts, strict=True):
        write(path, {name: weights[name] for name in part})
    weight_map = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")
    return [*paths, index]


def refusal(path: Path, task: str = "t2v-14B") -> str:
    with pytest.raises(InputError) as caught:
        check_fits_task(read_checkpoint_header(path), task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_loads(path: Path, weights: Weights, dtype: torch.dtype | None = None) -> WanModel:
    model = load_dit(path, dtype)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    return model


# ---- layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_loads_in_its_own_dtype_frozen_and_in_eval_mode(tmp_path, weights, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    path = write(tmp_path / "wan.safetensors", weights)
    model = assert_loads(path, weights)
    assert model.dtype == dtype == file_dtype(read_checkpoint_header(path)) and not is_fp8(read_checkpoint_header(path))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_file_is_cast_to_the_dtype_asked_for(tmp_path, weights):
    path = write(tmp_path / "wan.safetensors", weights)
    assert_loads(path, {name: tensor.bfloat16() for name, tensor in weights.items()}, torch.bfloat16)


def test_a_mixed_file_becomes_the_dtype_of_its_matrices(tmp_path, weights):
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    mixed = {name: weights[name] if "norm" in name or "modulation" in name else half[name] for name in weights}
    assert_loads(write(tmp_path / "wan.safetensors", mixed), half)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.diffusion_model.",
        "diffusion_model.",
        "model.",
        "transformer.",
        "dit.",
        "pipe.dit.",
        "module.",
        "_orig_mod.",
    ],
)
def test_known_prefixes_are_stripped(tmp_path, weights, prefix):
    path = write(tmp_path / "wan.safetensors", weights, prefix)
    assert_loads(path, weights)
    header = read_checkpoint_header(path)
    assert header.tensors["blocks.0.ffn.0.weight"].key == f"{prefix}blocks.0.ffn.0.weight"


def test_wrapper_parts_inside_names_are_stripped(tmp_path, weights):
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in weights.items()}
    assert_loads(write(tmp_path / "wan.safetensors", wrapped, "module."), weights)


def test_shards_load_from_any_shard_their_index_or_their_folder(tmp_path, weights):
    paths = write_shards(tmp_path, weights)
    for path in (*paths, tmp_path):
        assert_loads(path, weights)
    paths[-1].unlink()
    assert_loads(tmp_path, weights)
    assert read_checkpoint_header(tmp_path).files == tuple(paths[:-1])


def test_entries_say_where_the_bytes_of_a_tensor_lie(tmp_path, weights):
    header = read_checkpoint_header(write(tmp_path / "wan.safetensors", weights, "model."))
    for name, entry in header.tensors.items():
        stored = entry.file.read_bytes()[entry.start : entry.stop]
        assert (stored, entry.shape) == (weights[name].numpy().tobytes(), weights[name].shape)
        assert read_bytes(entry) == stored and torch.equal(read_tensor(entry), weights[name])


def test_an_unchanged_dtype_stays_mapped_from_the_file(tmp_path, weights):
    path = write(tmp_path / "wan.safetensors", weights)
    model = load_dit(str(path))
    entry = read_checkpoint_header(path).tensors["blocks.1.ffn.2.weight"]
    with path.open("r+b") as file:  # a mapped page that nobody wrote shows the file
        file.seek(entry.start)
        file.write(struct.pack("<f", 7.5))
    assert model.blocks[1].ffn[2].weight.flatten()[0] == 7.5


def test_heads_and_text_length_come_from_the_metadata_where_it_has_them(tmp_path, weights):
    path = write(tmp_path / "wan.safetensors", weights, metadata={"num_heads": "4", "text_len": "6"})
    assert (load_dit(path).config.num_heads, load_dit(path).text_len) == (4, 6)
    path = write(tmp_path / "plain.safetensors", weights, metadata=None)
    assert (load_dit(path).config.num_heads, load_dit(path).text_len) == (1, 512)


# ---- fp8


def fp8_file(weights: Weights, layout: str, rows: bool = False) -> tuple[Weights, Weights, dict]:
    """The stored tensors, the weights they stand for, and the metadata."""
    stored, meant, layers = {}, {}, {}
    for name, tensor in weights.items():
        stored[name] = meant[name] = tensor.bfloat16()
        if not (name.startswith("blocks.") and tensor.dim() == 2):
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.abs().amax(dim=1, keepdim=True) / 448 if rows else tensor.abs().max() / 448
        scale = torch.tensor(1.0) if layout == "plain" else scale
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        meant[name] = (stored[name].float() * scale).bfloat16()
        if layout == "old":
            stored |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(3.0)}
        if layout == "new":
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": comfy_quant("float8_e4m3fn")}
        if layout == "metadata":
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(3.0)}
            layers[layer] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    if layout == "old":
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return stored, meant, METADATA | ({"_quantization_metadata": json.dumps({"layers": layers})} if layers else {})


def comfy_quant(form: str, **extra) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": form, **extra}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("layout", ["plain", "old", "new", "metadata"])
def test_fp8_files_become_the_values_they_stand_for(tmp_path, weights, layout, rows):
    stored, meant, metadata = fp8_file(weights, layout, rows)
    path = write(tmp_path / "fp8.safetensors", stored, "model.diffusion_model.", metadata)
    assert_loads(path, meant)
    assert is_fp8(read_checkpoint_header(path))


@pytest.mark.parametrize("layout", ["plain", "old", "new", "metadata"])
@pytest.mark.parametrize("kind", ["i2v-A14B", "flf2v-14B", "ti2v-5B"])
def test_fp8_files_of_models_that_read_pictures_become_the_values_they_stand_for(tmp_path, kind, layout):
    weights = {name: tensor.detach().clone() for name, tensor in WanModel(KINDS[kind]).state_dict().items()}
    stored, meant, metadata = fp8_file(weights, layout)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) >= (24 if kind == "flf2v-14B" else 20)
    assert_loads(write(tmp_path / "fp8.safetensors", stored, "model.diffusion_model.", metadata), meant)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocks.0.self_attn.q.weight_scale": None}, "its scale is missing"),
        ({"blocks.0.self_attn.q.comfy_quant": comfy_quant("nvfp4")}, "nvfp4"),
        ({"blocks.0.self_attn.q.comfy_quant": comfy_quant("float8_e4m3fn", convrot=True)}, "convrot"),
        ({"blocks.0.self_attn.q.comfy_quant": torch.zeros(0, dtype=torch.uint8)}, "is not JSON"),
        ({"blocks.0.self_attn.q.weight_scale": torch.ones(128, 2)}, "per row"),
        ({"blocks.0.self_attn.q.weight_scale": torch.zeros(0)}, "per row"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(128, 128, dtype=torch.int8)}, "stored as I8"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(128, 128, dtype=torch.bfloat16)}, "scales a weight"),
        ({"blocks.0.self_attn.q.pre_quant_scale": torch.ones(128)}, "pre_quant_scale"),
        ({"blocks.9.self_attn.q.weight_scale": torch.ones(())}, "belongs to no weight"),
    ],
)
def test_other_quantised_files_are_refused(tmp_path, weights, change, told):
    stored, _, metadata = fp8_file(weights, "new")
    stored = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
    assert told in refusal(write(tmp_path / "fp8.safetensors", stored, metadata=metadata))


def test_a_scale_of_one_at_a_weight_that_was_kept_in_16_bit_is_fine(tmp_path, weights):
    stored, meant, metadata = fp8_file(weights, "old")
    stored["head.head.scale_weight"] = torch.ones(1)
    assert_loads(write(tmp_path / "fp8.safetensors", stored, metadata=metadata), meant)


# ---- other models, and the task


PICTURE = replace(TINY, model_type="i2v", in_dim=12)
CLIP = replace(PICTURE, image_dim=10)


@pytest.mark.parametrize(
    "config",
    [PICTURE, CLIP, replace(CLIP, model_type="flf2v"), replace(TINY, model_type="ti2v", in_dim=48, out_dim=48)],
    ids=["i2v", "i2v with CLIP", "flf2v", "ti2v"],
)
def test_other_models_are_read_from_the_shapes_of_their_file(tmp_path, config):
    weights = {name: tensor.detach().clone() for name, tensor in WanModel(config).state_dict().items()}
    path = write(tmp_path / "wan.safetensors", weights, "model.diffusion_model.")
    assert config_from_header(read_checkpoint_header(path)) == config
    assert assert_loads(path, weights).config == config


@lru_cache
def released_header(config: WanConfig) -> CheckpointHeader:
    with torch.device("meta"):
        tensors = WanModel(config).state_dict()
    file = Path("wan.safetensors")
    entries = {name: TensorEntry(file, name, "BF16", tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()}
    return CheckpointHeader((file,), entries, {}, "")


@pytest.mark.parametrize("other", TASKS)
@pytest.mark.parametrize("task", TASKS)
def test_a_released_checkpoint_of_another_task_names_all_tasks_that_it_fits(task, other):
    header, config = released_header(TASKS[task].config), TASKS[task].config
    assert config_from_header(header) == config
    if TASKS[other].config == config:
        check_fits_task(header, other)
        return
    fits = [name for name in TASKS if TASKS[name].config == config]
    with pytest.raises(InputError, match=rf"does not fit --task {other}: use --task {' or '.join(fits)}$"):
        check_fits_task(header, other)
    for name in fits:  # advice that leads to no other refusal
        check_fits_task(header, name)


@pytest.mark.parametrize("task", TASKS)
def test_the_released_names_and_shapes_are_read_as_the_task_s_model(task):
    shapes = RELEASED[RELEASED_NAMES.get(task, task)]
    file = Path("wan.safetensors")
    entries = {name: TensorEntry(file, f"model.{name}", "F16", tuple(shape), 0, 0) for name, shape in shapes.items()}
    header = CheckpointHeader((file,), entries, {}, "model.")
    assert config_from_header(header) == TASKS[task].config
    check_fits_task(header, task)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("i2v-A14B", "40 blocks, 36 input channels)"),
        ("i2v-14B", "36 input channels, CLIP for one picture)"),
        ("flf2v-14B", "36 input channels, CLIP for two pictures)"),
        ("ti2v-5B", "width 3072, 30 blocks, 48 input channels)"),
    ],
)
def test_what_tells_a_model_from_those_of_other_tasks_is_said(task, told):
    with pytest.raises(InputError) as caught:
        check_fits_task(released_header(TASKS[task].config), "t2v-14B")
    assert told in str(caught.value)


KINDS = {
    "t2v-1.3B or t2v-14B or t2i-14B or t2v-A14B": TINY,
    "i2v-A14B": PICTURE,
    "i2v-14B": CLIP,
    "flf2v-14B": replace(CLIP, model_type="flf2v"),
    "ti2v-5B": replace(TINY, model_type="ti2v", in_dim=48, out_dim=48),
}


@pytest.mark.parametrize("fits", KINDS)
def test_heads_in_the_metadata_fit_every_task_of_the_kind_alone(tmp_path, fits):
    path = write(tmp_path / "tiny.safetensors", WanModel(KINDS[fits]).state_dict())
    for task in TASKS:
        if task in fits.split(" or "):
            check_fits_task(read_checkpoint_header(path), task)
        else:
            assert refusal(path, task).endswith(f"does not fit --task {task}: use --task {fits}")


def test_widths_of_no_task_and_unknown_tasks_are_refused(tmp_path, weights):
    path = write(tmp_path / "tiny.safetensors", weights, metadata=None)
    assert "no task has such a model" in refusal(path)
    assert "i2v-13B is unknown; allowed are t2v-1.3B, t2v-14B, t2i-14B, t2v-A14B" in refusal(path, "i2v-13B")


# ---- refusals


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocks.1.ffn.0.bias": None}, "1 missing (blocks.1.ffn.0.bias)"),
        ({"blocks.0.extra.weight": torch.zeros(2)}, "1 unexpected (blocks.0.extra.weight)"),
        ({"blocks.1.ffn.0.bias": torch.zeros(3)}, "1 of another shape (blocks.1.ffn.0.bias)"),
        ({"img_emb.proj.0.bias": torch.zeros(2)}, "4 input and 4 output channels and a CLIP branch"),
        ({"vace_blocks.0.ffn.0.bias": torch.zeros(2)}, "is a VACE model"),
        ({"face_adapter.fuser_blocks.0.k_norm.weight": torch.zeros(2)}, "is an Animate model"),
        ({"casual_audio_encoder.weights": torch.zeros(2)}, "is a speech-to-video model"),
        ({"control_adapter.conv.weight": torch.zeros(2)}, "is a camera control model"),
        ({"ref_conv.weight": torch.zeros(2)}, "is a Fun-Control model"),
        ({"audio_proj.proj1.weight": torch.zeros(2)}, "is a model driven by audio"),
        ({"fps_embedding.weight": torch.zeros(2)}, "is a diffusion forcing model"),
        ({"patch_embedding.weight": torch.zeros(128, 13, 1, 2, 2)}, "13 input and 4 output channels (a control"),
        ({"patch_embedding.weight": None}, "patch_embedding.weight is missing"),
        ({"head.modulation": torch.zeros(2, 128)}, "head.modulation is [2, 128]"),
        ({"model.head.modulation": torch.zeros(1, 2, 128)}, "2 transformers"),
        ({"head.modulation": None}, "is not a Wan transformer"),
    ],
)
def test_files_that_are_not_exactly_one_transformer_are_refused(tmp_path, weights, change, told):
    changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    assert told in refusal(write(tmp_path / "wan.safetensors", changed))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"img_emb.emb_pos": torch.zeros(1, 257, 10)}, "1 of another shape (img_emb.emb_pos)"),
        ({"img_emb.proj.0.weight": None}, "img_emb.proj.0.weight is missing"),
        ({"img_emb.proj.1.weight": None}, "1 missing (img_emb.proj.1.weight)"),
        ({"blocks.1.cross_attn.k_img.bias": None}, "1 missing (blocks.1.cross_attn.k_img.bias)"),
        ({"patch_embedding.weight": torch.zeros(128, 4, 1, 2, 2)}, "4 input and 4 output channels and a CLIP branch"),
    ],
)
def test_image_to_video_models_are_read_strictly(tmp_path, change, told):
    weights = WanModel(replace(CLIP, model_type="flf2v")).state_dict()
    changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    assert told in refusal(write(tmp_path / "wan.safetensors", changed))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("condition_embedder.time_proj.weight", "diffusers checkpoint"),
        ("diffusion_model.blocks.0.ffn.0.lora_A.weight", "LoRA"),
        ("decoder.middle.0.residual.0.gamma", "VAE"),
        ("token_embedding.weight", "text encoder"),
        ("visual.transformer.0.norm1.weight", "CLIP image encoder"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", "CLIP image encoder"),
        ("vace_blocks.0.ffn.0.weight", "part of a VACE model, which is not supported"),
    ],
)
def test_other_kinds_of_files_are_recognised(tmp_path, name, told):
    assert told in refusal(write(tmp_path / "other.safetensors", {name: torch.zeros(2, 2)}))


@pytest.mark.parametrize(
    ("metadata", "told"),
    [({"num_heads": "3"}, "3 heads"), ({"num_heads": "x"}, "num_heads"), ({"text_len": "0"}, "text_len")],
)
def test_unusable_metadata_are_refused(tmp_path, weights, metadata, told):
    assert told in refusal(write(tmp_path / "wan.safetensors", weights, metadata=metadata))


def test_missing_files_and_other_formats_are_refused(tmp_path, weights):
    paths = write_shards(tmp_path, weights)
    assert "does not exist" in refusal(tmp_path / "nowhere.safetensors")
    (tmp_path / "wan.pth").write_bytes(b"PK\x03\x04")
    assert ".safetensors" in refusal(tmp_path / "wan.pth")
    paths[1].unlink()
    assert f"{paths[1]} does not exist" in refusal(paths[0])
    paths[-1].write_text("{}", encoding="utf-8")
    assert "is not the index" in refusal(paths[-1])


def test_a_folder_with_two_checkpoints_or_none_is_refused(tmp_path, weights):
    assert "found: none" in refusal(tmp_path)
    (tmp_path / "low_noise_model").mkdir()
    assert "use its folder low_noise_model" in refusal(tmp_path)
    write(tmp_path / "a.safetensors", weights), write(tmp_path / "b.safetensors", weights)
    assert "a.safetensors, b.safetensors" in refusal(tmp_path)


def test_a_folder_in_diffusers_format_is_told_apart_from_one_without_a_checkpoint(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    assert "is a diffusers checkpoint; use the original one" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("task", "in_dim"), [("t2v-1.3B", 48), ("i2v-14B", 48), ("i2v-A14B", 52), ("ti2v-5B", 100), ("ti2v-5B", 148)]
)
def test_released_control_and_inpainting_models_are_refused_by_their_channels(task, in_dim):
    header, config = released_header(TASKS[task].config), TASKS[task].config
    patches = replace(header.tensors["patch_embedding.weight"], shape=(config.dim, in_dim, 1, 2, 2))
    header = replace(header, tensors={**header.tensors, "patch_embedding.weight": patches})
    with pytest.raises(InputError, match=f"has {in_dim} input and {config.out_dim} output channels.*not supported"):
        check_fits_task(header, task)


def test_an_inpainting_model_of_a_size_without_a_task_is_refused_as_such():
    config = replace(TASKS["i2v-14B"].config, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    with pytest.raises(InputError, match=r"width 1536.*CLIP for one picture.*no task has such a model"):
        check_fits_task(released_header(config), "i2v-14B")


def test_a_tensor_in_two_shards_is_refused(tmp_path, weights):
    paths = write_shards(tmp_path, weights)
    write(paths[1], load_file(paths[1]) | {"head.modulation": weights["head.modulation"]})
    assert "head.modulation is in two of its files" in refusal(tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    tensors = {"a": torch.arange(5.0), "b.weight": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.empty(0)}
    return write(tmp_path_factory.mktemp("header") / "small.safetensors", tensors)


def test_a_truncated_or_longer_file_is_refused_at_every_length(small_file):
    whole = small_file.read_bytes()
    other = small_file.with_name("other.safetensors")
    for stored in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
        other.write_bytes(stored)
        with pytest.raises(InputError, match=r"other\.safetensors"):
            read_file_header(other)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_still_describes_the_file(small_file, position, byte):
    stored = bytearray(small_file.read_bytes())
    stored[position % len(stored)] = byte
    other = small_file.with_name("damaged.safetensors")
    other.write_bytes(stored)
    try:
        entries, _ = read_file_header(other)
    except InputError:
        return
    assert max(entry.stop for entry in entries.values()) == len(stored)
    if all(entry.dtype in DTYPES for entry in entries.values()):
        load_file(other)


def write_header(path: Path, text: str, data_bytes: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(data_bytes))
    return path


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    with pytest.raises(InputError, match="'a' appears twice"):
        read_file_header(write_header(tmp_path / "twice.safetensors", f"{{{entry},{entry}}}", 4))


@pytest.mark.parametrize("start", [0, 2, 6])
def test_tensors_that_overlap_or_leave_a_hole_are_refused(tmp_path, start):
    fields = {"a": [0, 4], "b": [start, start + 4]}
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": offsets} for name, offsets in fields.items()}
    with pytest.raises(InputError, match="do not follow"):
        read_file_header(write_header(tmp_path / "hole.safetensors", json.dumps(header), start + 4))

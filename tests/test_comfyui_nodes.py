"""The ComfyUI nodes against a stand-in of its interfaces: the weights are those of `slices apply`, wrong files end."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from comfy_stand_in import ModelPatcher, install
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chain import CONFIG, train_concept, write_base
from torch import nn

from utils.cli.slices import main
from utils.slices.on_base import scaled
from wan.model import WanModel

ROOT = Path(__file__).parents[1]
NODES = ROOT / "comfyui_wan_slices"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, two concepts each trained on it alone, one that lies over the first, and a base of the same shapes."""
    folder = tmp_path_factory.mktemp("comfyui")
    write_base(folder / "base.safetensors")
    write_base(folder / "other.safetensors", seed=1)
    for name, ff, ffid in (("one", "0.05", 2), ("two", "0.03", 1), ("over", "0.04", 2)):
        train_concept(folder / "base.safetensors", folder, name, ff, ffid)
    return folder


@pytest.fixture
def nodes(files, tmp_path, monkeypatch):
    """The nodes as ComfyUI imports them, from a pasted folder, with the slice files in models/slices."""
    paths = install(monkeypatch, tmp_path / "models")
    shutil.copytree(NODES, tmp_path / "custom_nodes" / "pasted")
    monkeypatch.syspath_prepend(str(tmp_path / "custom_nodes"))
    module = importlib.import_module("pasted")
    for path in files.glob("*.slice.safetensors"):
        shutil.copy(path, tmp_path / "models" / "slices" / path.name)
    yield {name: node() for name, node in module.NODE_CLASS_MAPPINGS.items()} | {"folder_paths": paths}
    for name in [name for name in sys.modules if name.partition(".")[0] == "pasted"]:
        del sys.modules[name]


def comfy_model(path, dtype=None):
    """The checkpoint as ComfyUI holds it, in its dtype or in another one."""
    inner = nn.Module()
    with torch.device("meta"):
        inner.diffusion_model = WanModel(CONFIG)
    weights = {name: weight if dtype is None else weight.to(dtype) for name, weight in load_file(path).items()}
    inner.diffusion_model.load_state_dict(weights, assign=True)
    return ModelPatcher(inner.requires_grad_(False))


def chained(nodes, model, *slices):
    """The model behind one Load Wan Slice node for each (name, strength)."""
    for name, strength in slices:
        model, _ = nodes["LoadWanSlice"].load(model, f"{name}.slice.safetensors", strength)
    return model


def applied(files, *slices, dtype=None):
    out = files / "applied.safetensors"
    paths, strengths = zip(*((files / f"{name}.slice.safetensors", strength) for name, strength in slices), strict=True)
    flags = [files / "base.safetensors", *paths, "--strength", *strengths, "-o", out, "--overwrite"]
    main(["apply", *map(str, flags)])
    return {f"diffusion_model.{name}": weight.to(dtype or weight.dtype) for name, weight in load_file(out).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[k].view(torch.uint8), expected[k].view(torch.uint8)) for k in expected)


def file_of(nodes, path, name="wrong.safetensors"):
    shutil.copy(path, Path(nodes["folder_paths"].models_dir) / "slices" / name)
    return name


def refusal(nodes, model, name, strength=1.0):
    with pytest.raises(ValueError) as caught:
        nodes["LoadWanSlice"].load(model, name, strength)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(nodes, files, change, name="wrong.safetensors"):
    """Slice `one` with changed metadata or values, by change(entry, tensors)."""
    with safe_open(files / "one.slice.safetensors", "pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    (entry,) = json.loads(metadata["wan_slices"])
    change(entry, tensors)
    metadata["wan_slices"] = json.dumps([entry])
    save_file(tensors, Path(nodes["folder_paths"].models_dir) / "slices" / name, metadata)
    return name


@pytest.mark.parametrize("name", ["selective_finetune.py", "slice_saving.py"])
def test_the_folder_brings_the_very_files_that_the_trainer_uses(name):
    told = "copy the files anew: cp utils/selective_finetune.py utils/slice_saving.py comfyui_wan_slices/"
    assert (NODES / name).read_bytes() == (ROOT / "utils" / name).read_bytes(), told


SETS = [
    (("one", 1),),
    (("one", 1), ("two", 1)),
    (("two", 1), ("one", 1)),
    (("one", 0.5),),
    (("two", -0.7), ("one", 1.3)),
    (("one", 0), ("two", 1)),
]


@pytest.mark.parametrize("slices", SETS, ids=str)
def test_loaded_weights_are_bit_for_bit_those_of_apply(nodes, files, slices):
    model = chained(nodes, comfy_model(files / "base.safetensors"), *slices)
    model.load()
    assert same(dict(model.model.state_dict()), applied(files, *slices))


@pytest.mark.parametrize("slices", SETS[2:5:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_offloaded_weights_are_those_of_apply_in_the_dtype_of_the_compute(nodes, files, slices, dtype):
    model = chained(nodes, comfy_model(files / "base.safetensors"), *slices)
    expected = applied(files, *slices, dtype=dtype)
    for _ in range(3):  # the later ones find the slice on the device
        assert same(model.offloaded(dtype), expected)


def test_half_of_a_slice_of_an_fp32_base_is_exact_where_the_compute_is_in_bf16(nodes, tmp_path):
    base = write_base(tmp_path / "base.safetensors", torch.float32)
    train_concept(base, tmp_path, "wide", "0.05", 2)
    file_of(nodes, tmp_path / "wide.slice.safetensors", "wide.slice.safetensors")
    model = chained(nodes, comfy_model(base), ("wide", 0.5))
    expected = applied(tmp_path, ("wide", 0.5), dtype=torch.bfloat16)
    assert same(model.offloaded(torch.bfloat16), expected)


def test_adapters_that_are_copied_to_the_device_ahead_of_use_do_the_same(nodes, files):
    model = chained(nodes, comfy_model(files / "base.safetensors"), ("one", 0.5), ("two", 1))
    assert same(model.prefetched(), applied(files, ("one", 0.5), ("two", 1)))


def test_a_bf16_base_that_is_held_in_fp32_is_recognised_and_exact(nodes, files):
    model, report = nodes["LoadWanSlice"].load(
        comfy_model(files / "base.safetensors", torch.float32), "one.slice.safetensors", 0.5
    )
    model.load()
    assert "the model is the slice's base" in report
    assert same(dict(model.model.state_dict()), applied(files, ("one", 0.5), dtype=torch.float32))


@pytest.mark.parametrize("strength", [0.5, -2.0, 1e-3])
def test_a_strength_does_to_any_value_what_apply_does(nodes, strength):
    special = torch.tensor([0.0, -0.0, 1.0, -1.5, 1e-38, 3e38, 2.0078125], dtype=torch.bfloat16)
    start, final = (part.flatten() for part in torch.meshgrid(special, special, indexing="ij"))
    theirs = sys.modules["pasted.on_model"].scaled(start, final, strength)
    kept = theirs.isfinite()  # where apply refuses, a model would hold infinite values
    ours = scaled(start[kept], final[kept], strength)
    assert kept.sum() > 30 and torch.equal(ours.view(torch.int16), theirs[kept].view(torch.int16))


def test_unloading_gives_every_bit_of_the_base_back_and_the_first_model_stays_as_it_was(nodes, files):
    base = comfy_model(files / "base.safetensors")
    before = {key: weight.clone() for key, weight in base.model.state_dict().items()}
    model = chained(nodes, base, ("one", 1), ("two", 0.5))
    model.load()
    assert base.patches == {} and not same(dict(base.model.state_dict()), before)
    model.unload()
    assert same(dict(base.model.state_dict()), before)


def test_a_lora_gives_the_same_before_and_after_a_slice(nodes, files):
    key = "diffusion_model.blocks.0.ffn.0.weight"
    change = torch.full((96, 48), 0.25)
    after, before = (
        chained(nodes, comfy_model(files / "base.safetensors"), ("one", 1)),
        comfy_model(files / "base.safetensors"),
    )
    after.add_patches({key: change}, 0.5)
    before.add_patches({key: change}, 0.5)
    before = chained(nodes, before, ("one", 1))
    expected = (applied(files, ("one", 1))[key].float() + 0.125).bfloat16()
    for model in (after, before):
        model.load()
        assert torch.equal(model.model.state_dict()[key], expected)


def test_a_file_that_is_written_anew_leaves_a_model_that_has_it_as_it_was(nodes, files):
    model = chained(nodes, comfy_model(files / "base.safetensors"), ("one", 1))
    path = Path(nodes["folder_paths"].models_dir) / "slices" / "one.slice.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    model.load()
    assert same(dict(model.model.state_dict()), applied(files, ("one", 1)))


def test_a_base_is_recognised_while_another_chain_of_nodes_has_it_loaded(nodes, files):
    base = comfy_model(files / "base.safetensors")
    chained(nodes, base, ("one", 1)).load()
    assert "the model is the slice's base" in nodes["LoadWanSlice"].load(base, "one.slice.safetensors", 1)[1]
    base.hook_backup = {key: (saved.weight, None) for key, saved in base.backup.items()}  # as hooks keep them
    base.backup.clear()
    assert "the model is the slice's base" in nodes["LoadWanSlice"].load(base, "one.slice.safetensors", 1)[1]


def test_a_quantised_weight_s_shape_is_the_matrix_s_and_what_state_dict_adds_does_not_disturb(nodes, files):
    class Packed(torch.Tensor):
        shape = torch.Size((96, 48))

    base = comfy_model(files / "base.safetensors")
    linear = base.model.diffusion_model.blocks[0].ffn[0]
    packed = torch.zeros(96, 27, dtype=torch.bfloat16).as_subclass(Packed)  # a dtype that is not the stored one's
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.register_state_dict_post_hook(lambda _, state, prefix, __: state.update({f"{prefix}temp.weight": packed}))
    model, report = nodes["LoadWanSlice"].load(base, "one.slice.safetensors", 1)
    assert "cannot be checked" in report and len(model.patches) == 30


def test_another_base_of_the_same_shapes_is_refused(nodes, files):
    told = refusal(nodes, comfy_model(files / "other.safetensors"), "one.slice.safetensors", 0)
    assert "one (ff 0.05 ffid 2), was trained on: another model, the other one of two A14B experts" in told


def test_a_checkpoint_that_holds_the_slice_already_is_refused(nodes, files):
    assert "holds one (ff 0.05 ffid 2) already" in refusal(
        nodes, comfy_model(files / "one.safetensors"), "one.slice.safetensors"
    )


def test_slices_that_share_values_are_refused(nodes, files):
    model = chained(nodes, comfy_model(files / "base.safetensors"), ("two", 1), ("one", 1))
    told = refusal(nodes, model, "over.slice.safetensors")
    assert "over (ff 0.04 ffid 2), shares values with one.slice.safetensors, one (ff 0.05 ffid 2)" in told


def test_a_slice_behind_a_merge_of_two_models_is_refused_and_before_it_is_taken(nodes, files):
    model = chained(nodes, comfy_model(files / "base.safetensors"), ("one", 1))
    weights = comfy_model(files / "other.safetensors").model.state_dict()
    model.add_patches({key: [(weight, None)] for key, weight in weights.items()}, 0.5, 0.5)
    told = refusal(nodes, model, "two.slice.safetensors")
    assert "two models were merged before this node, so two (ff 0.03 ffid 1) would be merged, too" in told


def test_a_long_name_of_a_concept_is_cut_in_messages(nodes, files):
    name = rewritten(nodes, files, lambda entry, _: entry.update(name="long " * 2000))
    assert len(refusal(nodes, comfy_model(files / "other.safetensors"), name)) < 500


def test_a_quantised_base_takes_the_slice_and_says_what_cannot_be_checked(nodes, files):
    base = comfy_model(files / "base.safetensors")
    for block in base.model.diffusion_model.blocks:
        block.ffn[0].weight = nn.Parameter(block.ffn[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    model, report = nodes["LoadWanSlice"].load(base, "one.slice.safetensors", 1)
    key = "diffusion_model.blocks.1.ffn.0.weight"
    final = load_file(files / "one.slice.safetensors")["blocks.1.ffn.0.weight"]
    (_, adapter, *_) = model.patches[key][0]
    _, _, columns_U, groups_U, own = adapter.weights
    found = model.offloaded(torch.bfloat16)[key].view(8, 12, 48)[groups_U, :, columns_U]
    assert "cannot be checked" in report and torch.equal(own.units.cut(found), final)


def test_a_file_of_the_first_version_says_that_it_cannot_be_checked(nodes, files):
    name = rewritten(nodes, files, lambda entry, _: entry.pop("start"))
    report = nodes["LoadWanSlice"].load(comfy_model(files / "other.safetensors"), name, 1)[1]
    assert "does not record its base" in report


def test_files_that_are_not_slices_are_told_apart(nodes, files):
    base = comfy_model(files / "base.safetensors")
    lora = files / "lora.safetensors"
    main(["to-lora", str(files / "one.slice.safetensors"), "--base", str(files / "base.safetensors"), "-o", str(lora)])
    save_file({"x": torch.zeros(2)}, files / "x.safetensors")
    answers = files / "answers.safetensors"
    save_file({"x": torch.zeros(2)}, answers, {"wan_answers": "1"})
    assert "is a LoRA, not a slice file" in refusal(nodes, base, file_of(nodes, lora))
    assert "is a whole checkpoint, not a slice" in refusal(nodes, base, file_of(nodes, files / "one.safetensors"))
    assert "is not a slice file" in refusal(nodes, base, file_of(nodes, files / "x.safetensors"))
    assert "reference predictions" in refusal(nodes, base, file_of(nodes, answers))
    assert "not in models/slices any more" in refusal(nodes, base, "gone.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda entry, _: entry.update(contract=2), "slice contract 2, these nodes know contract 1"),
        (lambda entry, _: entry.update(ffid=21), "is damaged: ffid is 21: at ff 0.05 it runs from 1 to 20"),
        (lambda entry, _: entry.update(ff=0.05), "does not describe a slice"),
        (lambda entry, _: entry.update(ffid=3), "has 230 values for blocks.0.ffn.0.weight, and this model needs 231"),
        (lambda _, tensors: tensors.pop("blocks.2.ffn.0.weight"), "it has 0 values for blocks.2.ffn.0.weight"),
        (lambda _, tensors: tensors["blocks.0.ffn.0.weight"].fill_(float("nan")), "does not hold a slice's values"),
    ],
)
def test_a_damaged_or_newer_file_is_refused_in_one_line(nodes, files, change, told):
    assert told in refusal(nodes, comfy_model(files / "base.safetensors"), rewritten(nodes, files, change))


def test_a_truncated_file_and_one_of_garbage_are_refused_in_one_line(nodes, files, tmp_path):
    whole = (files / "one.slice.safetensors").read_bytes()
    for number, held in enumerate((whole[:-7], whole[:40], b"", b"\xff" * 999)):
        (tmp_path / "part").write_bytes(held)
        name = file_of(nodes, tmp_path / "part", f"part{number}.safetensors")
        assert "is damaged, or not a safetensors file" in refusal(nodes, comfy_model(files / "base.safetensors"), name)


def test_a_model_that_is_not_wan_is_refused(nodes):
    other = nn.Module()
    other.diffusion_model = nn.Sequential(nn.Linear(4, 4))
    assert "this model has none of its matrices" in refusal(nodes, ModelPatcher(other), "one.slice.safetensors")


def test_info_tells_what_the_file_holds_on_lines_of_its_own(nodes, files):
    def change(entry, _):
        entry.update(name="a\x07b", captions=["a girl\nin a boat", "two"], strength=0.5)

    (text,) = nodes["WanSliceInfo"].info(rewritten(nodes, files, change))
    assert "concept: a b" in text and "slice: ff 0.05, ffid 2, contract 1" in text and "steps: 20" in text
    assert "strength in the file: 0.5" in text and text.endswith("captions:\n  a girl in a boat\n  two")


def test_the_nodes_list_slice_files_and_notice_when_one_changes(nodes):
    listed, _ = nodes["LoadWanSlice"].INPUT_TYPES()["required"]["slice_name"]
    assert listed == ["one.slice.safetensors", "over.slice.safetensors", "two.slice.safetensors"]
    path = Path(nodes["folder_paths"].models_dir) / "slices" / listed[0]
    before = [nodes[name].IS_CHANGED(slice_name=listed[0]) for name in ("LoadWanSlice", "WanSliceInfo")]
    path.write_bytes(path.read_bytes() + b" ")
    assert all(nodes[name].IS_CHANGED(slice_name=listed[0]) != before[0] for name in ("LoadWanSlice", "WanSliceInfo"))
    assert nodes["LoadWanSlice"].IS_CHANGED(slice_name="gone") == "missing"


def test_models_in_a_folder_that_cannot_be_written_leave_the_nodes_usable(tmp_path, monkeypatch):
    (tmp_path / "models").write_text("a file: no folder can be made below it")
    paths = install(monkeypatch, tmp_path / "models")
    paths.add_model_folder_path("slices", str(tmp_path))  # as extra_model_paths.yaml does
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.reload(importlib.import_module("comfyui_wan_slices.nodes"))
    (tmp_path / "a.safetensors").touch()
    assert module.LoadWanSlice.INPUT_TYPES()["required"]["slice_name"][0] == ["a.safetensors"]


def graph_of(workflow):
    """A workflow that was saved from ComfyUI's window as its API has it: inputs are links or widgets' values."""
    links = {number: [str(source), slot] for number, source, slot, *_ in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] != "MarkdownNote":
            joined = {wire["name"]: links[wire["link"]] for wire in node["inputs"]}
            values = [value for value in node["widgets_values"] if value != "fixed"]  # beside a seed
            graph[str(node["id"])] = (node["type"], joined, values)
    return graph


def test_the_example_workflow_is_the_same_in_both_forms_and_uses_inputs_that_the_node_has(nodes):
    name = "wan22_a14b_two_slices.json"
    window, api = (json.loads((NODES / folder / name).read_text()) for folder in ("example_workflows", "example_api"))
    found = {
        number: (
            node["class_type"],
            {key: value for key, value in node["inputs"].items() if isinstance(value, list)},
            [value for value in node["inputs"].values() if not isinstance(value, list)],
        )
        for number, node in api.items()
    }
    loaders = [node for node in api.values() if node["class_type"] == "LoadWanSlice"]
    assert graph_of(window) == found and len(loaders) == 2
    assert all(list(node["inputs"]) == list(nodes["LoadWanSlice"].INPUT_TYPES()["required"]) for node in loaders)

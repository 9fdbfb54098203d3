"""Memory is checked before it is taken: what a process may still have, and what each part of a job needs."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import CONFIG, ORACLE, flags, run, write_dataset, write_dit, write_inputs

from utils.cli.train import parse_train
from utils.data.dataset import build_training_dataset
from utils.run.opening_lines import input_bytes
from utils.swap import memory_checks
from utils.swap.memory_checks import StepNeeds, check_device, check_host, check_loading, weight_needs
from utils.swap.plan import SwapConfig, WeightSizes, device_bytes, plan_swap
from wan import memory, text_encoder
from wan.errors import InputError
from wan.loading import cast_bytes, load_dit, read_checkpoint_header
from wan.memory import check_room
from wan.text_encoder import load_text_encoder

GB = 10**9
SQUARE, TALL = 2 * 5120 * 5120, 2 * 5120 * 13824
WAN_14B = WeightSizes(40, [SQUARE] * 8 + [TALL] * 2, outside=464_912_384, small=11_000_000)
CLIP = 2 * 32_760 * 5120  # the input of a block: 81 frames of 832x480
CUDA = torch.device("cuda", 0)


def needs(swap=SwapConfig(), cast=0, mapped=True, on_cpu=False, trains=True):  # noqa: B008
    return weight_needs(WAN_14B, swap, cast, mapped, on_cpu, trains)


def write_cgroup(folder, limit, usage, droppable, version=2):
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_"), 2: ("max", "current", "")}
    inactive = droppable // 3
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[version][0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[version][1]}").write_text(f"{usage}\n")
    kinds = {"anon": 3000, f"{names[version][2]}inactive_file": inactive}
    kinds[f"{names[version][2]}active_file"] = droppable - inactive
    (folder / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in kinds.items()))


@pytest.mark.parametrize(
    ("version", "top", "own"),
    [(2, ".", "0::{}\n"), (1, "memory", "9:name=systemd:/x\n4:cpu,memory:{}\n")],
)
def test_the_least_room_of_the_own_cgroup_and_those_above_counts(version, top, own, tmp_path):
    told = tmp_path / "own"
    write_cgroup(tmp_path / top, 8000, 5000, 1500, version)
    write_cgroup(tmp_path / top / "user" / "job", "max" if version == 2 else 2**63 - 4096, 10, 0, version)
    write_cgroup(tmp_path / top / "other", 1, 0, 0, version)
    rooms = []
    for path, limit in (("/", 0), ("/user/job", 0), ("/user/job", 3000), ("/not/mounted/here", 3000)):
        if limit:
            write_cgroup(tmp_path / top / "user", limit, 2000, 500, version)
        told.write_text(own.format(path))
        rooms.append(memory._cgroup_room(tmp_path, told))
    assert rooms == [8000 - (5000 - 1500), 8000 - (5000 - 1500), 3000 - (2000 - 500), 8000 - (5000 - 1500)]


def test_without_cgroups_there_is_no_limit(tmp_path):
    write_cgroup(tmp_path, "max", 5000, 0)
    assert memory._cgroup_room(tmp_path, tmp_path / "none") >= 10**18
    (tmp_path / "own").write_text("0::/\n")
    assert memory._cgroup_room(tmp_path, tmp_path / "own") >= 10**18


def test_local_processes_share_the_memory(monkeypatch):
    monkeypatch.setattr(memory, "_cgroup_room", lambda *_: 10_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_bytes() == 2500


def test_address_space_limits_count(monkeypatch):
    resource = pytest.importorskip("resource")
    used = memory.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + GB, resource.RLIM_INFINITY))
    assert 0.9 * GB < memory.available_bytes() < 1.1 * GB


def test_what_pytorch_holds_but_does_not_use_is_free_on_the_device(monkeypatch):
    numbers = {"mem_get_info": (5, 24), "memory_reserved": 7, "memory_allocated": 4}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_device_bytes("cuda:0") == 8 and memory.free_device_bytes("cpu") is None


def test_a_refusal_names_every_part_and_what_is_free():
    with pytest.raises(InputError) as error:
        check_room({"the weights": 28 * GB, "nothing": 0, "the slice": GB}, 20 * GB, "RAM", "use less")
    assert str(error.value) == (
        "not enough RAM: it takes 28.0 GB for the weights and 1.0 GB for the slice, and 20.0 GB are free; use less"
    )
    check_room({"the weights": 20 * GB}, 20 * GB, "RAM", "")
    check_room({"the weights": 20 * GB}, None, "memory of an unknown device", "")


@pytest.mark.parametrize(
    ("given", "loading", "host", "device"),
    [
        ({}, 0, 0, 28.6),
        ({"swap": SwapConfig(40)}, 0, 0, 1.4),
        ({"swap": SwapConfig(40, host_weights="pinned")}, 0, 28.6, 1.4),
        ({"swap": SwapConfig(40), "cast": 28 * GB, "mapped": False}, 28, 28.6, 1.4),
        ({"on_cpu": True}, 0, 28.6, 0),
        ({"on_cpu": True, "trains": False}, 0, 0, 0),
        ({"on_cpu": True, "swap": SwapConfig(40)}, 0, 1.4, 0),
        ({"on_cpu": True, "cast": 28 * GB, "mapped": False, "trains": False}, 28, 28.6, 0),
    ],
)
def test_only_copies_of_weights_take_ram(given, loading, host, device):
    found = needs(**given)
    assert [round(size / GB, 1) for size in (found.loading, found.host, found.device)] == [loading, host, device]


def refusal(check, *given):
    with pytest.raises(InputError) as error:
        check(*given)
    return str(error.value)


def test_a_cast_that_does_not_fit_is_refused_with_what_reads_the_file_in_place():
    cast = needs(cast=57 * GB, mapped=False)
    line = refusal(check_loading, cast, torch.bfloat16, torch.float32, 31 * GB, "use --mixed_precision bf16")
    assert "57.0 GB for casting the weights from bfloat16 to float32, and 31.0 GB are free; use --mixed_prec" in line
    check_loading(cast, torch.bfloat16, torch.float32, 57 * GB, "")


def test_block_inputs_and_weights_in_ram_count_together():
    step = StepNeeds(0, CLIP, offloaded=True)
    pinned = needs(SwapConfig(40, host_weights="pinned"))
    line = refusal(check_host, pinned, step, 40, False, 41 * GB, "use --host_weights mapped")
    assert "28.6 GB for the weights and 13.1 GB for the inputs of the blocks" in line
    assert "use --host_weights mapped, or train on fewer frames" in line
    check_host(pinned, step, 40, False, 42 * GB, "")
    assert "mapped" not in refusal(check_host, needs(SwapConfig(40)), step, 40, False, 13 * GB, "use mapped")


def test_a_slice_that_is_too_large_for_the_ram_of_a_cpu_is_refused_with_a_smaller_one():
    whole = StepNeeds(14 * GB * 10)
    assert "choose a smaller --ff" in refusal(check_host, needs(on_cpu=True), whole, 40, True, 100 * GB, "swap")


@pytest.mark.parametrize("free", [28, 24, 16, 8, 3])
def test_the_blocks_that_are_to_be_swapped_on_a_small_gpu_are_named_and_fit(free):
    step, resident = StepNeeds(280_000_000), needs()
    line = refusal(check_device, resident, step, WAN_14B, SwapConfig(), CUDA, free * GB)
    blocks = int(re.search(r"--blocks_to_swap (\d+) or more", line)[1])
    fewer, enough = (device_bytes(WAN_14B, plan_swap(WAN_14B, SwapConfig(n))) for n in (blocks - 1, blocks))
    assert enough + step.trained <= free * GB < fewer + step.trained
    check_device(needs(SwapConfig(blocks)), step, WAN_14B, SwapConfig(blocks), CUDA, free * GB)


def test_block_inputs_on_a_small_gpu_are_refused_with_the_way_to_the_ram():
    line = refusal(check_device, needs(SwapConfig(40)), StepNeeds(0, CLIP), WAN_14B, SwapConfig(40), CUDA, 12 * GB)
    assert "13.4 GB for the inputs" in line and "use --gradient_checkpointing --gradient_checkpointing_cpu" in line
    assert "--blocks_to_swap" not in line
    offloaded = StepNeeds(0, CLIP, offloaded=True)
    check_device(needs(SwapConfig(40)), offloaded, WAN_14B, SwapConfig(40), CUDA, 12 * GB)


def test_a_budget_beyond_the_gpu_is_refused_with_a_smaller_one():
    swap = SwapConfig(weights_vram=20 * GB)
    line = refusal(check_device, needs(swap), None, WAN_14B, swap, CUDA, 8 * GB)
    assert "use --weights_vram 8000MB or less" in line
    check_device(needs(SwapConfig(weights_vram=8 * GB)), None, WAN_14B, swap, CUDA, 8 * GB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("memory"))


def test_cast_bytes_are_those_of_the_tensors_that_are_copied(folder):
    header = read_checkpoint_header(folder / "base.safetensors")
    assert cast_bytes(header, torch.bfloat16) == 0
    model = load_dit(folder / "base.safetensors", torch.float32)
    assert cast_bytes(header, torch.float32) == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ((), "casting the weights from bfloat16 to float32.*; use --mixed_precision bf16, so that"),
        (("--mixed_precision", "bf16"), "for the weights and .* inputs of the blocks .*; use --blocks_to_swap 2"),
        (("--mixed_precision", "bf16", "--dit", "{folder}/wide.safetensors"), "use a bf16 file as --dit"),
        (("--mixed_precision", "bf16", "--blocks_to_swap", "2", "--host_weights", "staged"), "use --host_weights mapp"),
    ],
)
def test_a_run_without_the_memory_ends_before_its_model_loads(more, line, folder, monkeypatch):
    write_dit(folder / "wide.safetensors", torch.float32)
    monkeypatch.setattr("utils.run.preparing.load_with_slices", None)
    monkeypatch.setattr(memory_checks, "available_bytes", lambda: 10_000)
    with pytest.raises(InputError, match=f"^not enough RAM: .*{line}"):
        run(folder, *(flag.format(folder=folder) for flag in more))


def test_a_run_without_the_device_memory_ends_before_its_model_loads(folder, monkeypatch):
    monkeypatch.setattr("utils.run.preparing.load_with_slices", None)
    monkeypatch.setattr(memory_checks, "free_device_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"^not enough memory on cpu: .* for the slice"):
        run(folder, "--mixed_precision", "bf16")


def test_the_input_of_a_block_is_that_of_the_largest_batch_also_where_items_repeat(tmp_path):
    config = write_dataset(tmp_path)
    config.write_text(config.read_text(encoding="utf-8") + "\nnum_repeats = 3", encoding="utf-8")
    write_dit(tmp_path / "base.safetensors")
    dataset = build_training_dataset(parse_train(flags(tmp_path)).dataset)
    batches = dataset.epoch_batches(seed=0, epoch=0)
    tokens = 2 * 2  # in a batch of two pictures of 16x32
    assert input_bytes(CONFIG, torch.bfloat16, dataset, batches) == tokens * CONFIG.dim * 2
    assert input_bytes(CONFIG, torch.bfloat16, dataset, batches, (16, 1, 4, 8)) == 8 * CONFIG.dim * 2


@pytest.fixture
def encoder(tmp_path):
    stored = load_file(ORACLE / "umt5_encoder.safetensors")
    weights = {key.removeprefix("weight."): value for key, value in stored.items() if key.startswith("weight.")}
    save_file(weights, tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


def test_a_text_encoder_that_is_cast_needs_ram_and_one_that_is_read_in_place_needs_none(encoder, monkeypatch):
    monkeypatch.setattr(text_encoder, "available_bytes", lambda: 1000)
    load_text_encoder(encoder, dtype=torch.float32)
    with pytest.raises(InputError, match=r"^not enough RAM: .* for the text encoder .*; use the bfloat16 file of"):
        load_text_encoder(encoder, dtype=torch.bfloat16)


def test_a_text_encoder_that_does_not_fit_on_the_device_is_refused_before_it_is_moved_there(encoder, monkeypatch):
    monkeypatch.setattr(text_encoder, "free_device_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"^not enough memory on cuda:1: .*; caching and generating also work"):
        load_text_encoder(encoder, device="cuda:1")

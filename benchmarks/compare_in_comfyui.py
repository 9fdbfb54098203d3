"""Do the nodes in a real ComfyUI give the weights that `python -m utils.slices apply` writes, bit for bit?

    python benchmarks/compare_in_comfyui.py --comfyui COMFYUI [--gguf COMFYUI-GGUF]

COMFYUI is a checkout, used as it is; the project's folder of nodes is loaded into it as it loads any. The model is a
random Wan T2V of width 256, with two slices. Files are made here; another process, in which ComfyUI runs on the CPU,
compares: this project and ComfyUI both have a package called `utils`.
"""

import argparse
import asyncio
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
from itertools import chain
from pathlib import Path
from unittest.mock import MagicMock

import torch

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "comfyui_wan_slices"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SETS = {  # name: slices with their strengths, in the order of the nodes
    "one slice": [("one", 1)],
    "two slices": [("one", 1), ("two", 1)],
    "reversed": [("two", 1), ("one", 1)],
    "half strength": [("one", 0.5), ("two", 0.5)],
    "1.3 and -0.7": [("one", 1.3), ("two", -0.7)],
    "strength 0": [("one", 0)],
}
ABSENT = ("torchvision", "torchaudio", "kornia", "spandrel")  # what ComfyUI imports and text-to-video does not use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="checkout of ComfyUI")
    parser.add_argument("--gguf", type=Path, help="checkout of ComfyUI-GGUF, for its rows (needs the package gguf)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.inside:
        compare(flags.inside, flags.comfyui.resolve(), flags.gguf and flags.gguf.resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        again = [sys.executable, __file__, *sys.argv[1:], "--inside", folder]
        sys.exit(subprocess.run(again).returncode)


# ---- the files, by this project


def make_files(folder: Path) -> None:
    """For each dtype a base, another one, two slices and what `apply` makes of every set; a LoRA of the bf16 ones."""
    sys.path.insert(0, str(ROOT))
    from utils.cli.slices import main as slices

    for dtype in DTYPES:
        base = write_base(folder / f"{dtype}.base.safetensors", DTYPES[dtype], seed=0)
        for number, name in enumerate(("one", "two"), start=1):
            write_slice(base, folder, f"{dtype}.{name}", number)
        for number, chosen in enumerate(SETS.values()):
            paths = [folder / f"{dtype}.{name}.slice.safetensors" for name, _ in chosen]
            strengths = [strength for _, strength in chosen]
            slices(
                list(map(str, ["apply", base, *paths, "--strength", *strengths, "-o", applied(folder, dtype, number)]))
            )
    write_base(folder / "bf16.other.safetensors", torch.bfloat16, seed=1)
    one, base = folder / "bf16.one.slice.safetensors", folder / "bf16.base.safetensors"
    slices(["to-lora", str(one), "--base", str(base), "-o", str(folder / "bf16.lora.safetensors")])


def applied(folder: Path, dtype: str, number: int) -> Path:
    return folder / f"{dtype}.applied{number}.safetensors"


def write_base(path: Path, dtype: torch.dtype, seed: int) -> Path:
    from safetensors.torch import save_file

    from wan.configs import WanConfig
    from wan.model import WanModel

    torch.manual_seed(seed)
    config = WanConfig("t2v", 256, 512, 2, 3, 16, 16, text_dim=4096, freq_dim=256, text_len=512)
    model = WanModel(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    save_file({name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}, path)
    return path


def write_slice(base: Path, folder: Path, name: str, ffid: int) -> None:
    from utils.selective_finetune import attach_slice
    from utils.slice_saving import save_slice
    from wan.loading import load_dit

    trained = attach_slice(load_dit(base), "0.02", ffid)
    draw = torch.Generator().manual_seed(ffid)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    save_slice(trained, base, folder / f"{name}.slice.safetensors", concept=name, steps=100, captions=["a caption"])


# ---- the comparison, by ComfyUI


class Absent:
    """Gives empty stand-ins for packages that are not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Absent, is_package=True) if name.split(".")[0] in ABSENT else None

    @staticmethod
    def create_module(spec):
        module = type(spec.name, (types.ModuleType,), {"__getattr__": lambda self, name: named(self, name)})(spec.name)
        module.__path__ = []
        return module

    @staticmethod
    def exec_module(module):
        pass


def named(module, name):
    if name.startswith("__"):
        raise AttributeError(name)
    return "0.0" if name == "version" else MagicMock()


def compare(folder: Path, comfyui: Path, gguf: Path | None) -> None:
    """Prints a row for each case; ends with status 1 if one is not as it should be."""
    sys.path[0] = str(comfyui)
    sys.meta_path.append(Absent)
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    torch.set_num_threads(1)  # small sizes: threads would wait for each other
    args.cpu = True
    import folder_paths
    import nodes

    folder_paths.models_dir = str(folder / "models")
    assert asyncio.run(nodes.load_custom_node(str(NODES)))
    for path in folder.glob("*.safetensors"):
        shutil.copy(path, folder / "models" / "slices")
    from comfyui_version import __version__

    print(f"ComfyUI {__version__}, torch {torch.__version__}")
    rows = (row for dtype in DTYPES for number, name in enumerate(SETS) for row in exact(folder, dtype, number, name))
    good = True
    for what, outcome, is_right in chain(rows, mixed(folder), merged(folder), quantised(folder, gguf), refused(folder)):
        print(f"{'ok   ' if is_right else 'WRONG'} {what}: {outcome}", flush=True)
        good &= is_right
    sys.exit(not good)


def load(path: Path, **options):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def with_slices(model, dtype: str, number: int):
    import nodes

    for name, strength in list(SETS.values())[number]:
        node = nodes.NODE_CLASS_MAPPINGS["LoadWanSlice"]()
        model, report = node.load(model, f"{dtype}.{name}.slice.safetensors", strength)
        assert "the model is the slice's base" in report or "quantised" in report, report
    return model


def exact(folder: Path, dtype: str, number: int, name: str):
    """The set of slices against the checkpoint of `apply`: resident, offloaded, the output, and unloaded again."""
    own = DTYPES[dtype]
    expected = resident(load(applied(folder, dtype, number), dtype=own))
    model = with_slices(load(folder / f"{dtype}.base.safetensors", dtype=own), dtype, number)
    yield f"{dtype}, {name}", *compared(resident(model), expected)
    yield (
        f"{dtype}, {name}, output",
        *compared([output(model)], [output(load(applied(folder, dtype, number), dtype=own))]),
    )
    model.unpatch_model(torch.device("cpu"))
    base = resident(load(folder / f"{dtype}.base.safetensors", dtype=own))
    yield f"{dtype}, {name}, unloaded", *compared(weights(model), base)
    for compute in DTYPES.values():
        cast = {key: weight.to(compute) for key, weight in expected.items()}
        yield f"{dtype}, {name}, offloaded, {compute}", *compared(offloaded(model, compute), cast)


def resident(model) -> dict[str, torch.Tensor]:
    model.patch_model(device_to=torch.device("cpu"))
    return weights(model)


def weights(model) -> dict[str, torch.Tensor]:
    return {key: weight.clone() for key, weight in model.model.state_dict().items() if is_block_matrix(key)}


def is_block_matrix(key: str) -> bool:
    return ".blocks." in key and key.endswith(".weight") and "norm" not in key


def offloaded(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What each matrix computes with while it stays in host memory, the third time that it is asked for."""
    import comfy.ops

    fresh = model.clone()
    fresh.unpatch_model(torch.device("cpu"))
    fresh.load(torch.device("cpu"), lowvram_model_memory=1)
    modules = {key: fresh.model.get_submodule(key.removesuffix(".weight")) for key in weights(fresh)}
    assert modules and all(module.comfy_cast_weights for module in modules.values())
    found = {}
    for _ in range(3):
        for key, module in modules.items():
            found[key] = comfy.ops.cast_bias_weight(module, dtype=dtype, device=torch.device("cpu"))[0].clone()
    fresh.unpatch_model(torch.device("cpu"))
    return found


@torch.no_grad()
def output(model) -> torch.Tensor:
    model.patch_model(device_to=torch.device("cpu"))
    draw = torch.Generator().manual_seed(5)
    dtype = next(model.model.diffusion_model.blocks.parameters()).dtype
    dtype = dtype if dtype in DTYPES.values() else torch.bfloat16
    x, context = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(1, 512, 4096, generator=draw)
    return model.model.diffusion_model(x.to(dtype), torch.tensor([500.0]), context.to(dtype), transformer_options={})


def compared(found, expected) -> tuple[str, bool]:
    """How many values of the two differ in their bits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys() and len(found) == 30, (len(found), len(expected))
        found, expected = ([part[key] for key in expected] for part in (found, expected))
    differ = [
        (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum().item()
        for a, b in zip(found, expected, strict=True)
    ]
    count = sum(own.numel() for own in expected)
    return f"{'equal' if not any(differ) else f'{sum(differ):,} bytes differ'} ({count:,} values)", not any(differ)


def mixed(folder: Path):
    """A LoRA before or after a slice."""
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(folder / "bf16.lora.safetensors"))
    found = []
    for order in ("first", "last"):
        model = load(folder / "bf16.base.safetensors", dtype=torch.bfloat16)
        model = comfy.sd.load_lora_for_models(model, None, lora, 1, 0)[0] if order == "first" else model
        model = with_slices(model, "bf16", 1)
        found.append(comfy.sd.load_lora_for_models(model, None, lora, 1, 0)[0] if order == "last" else model)
    yield "bf16, a LoRA before or after two slices", *compared(*map(resident, found))
    expected = sampled(load(applied(folder, "bf16", 1), dtype=torch.bfloat16))
    for number in (1, 2):
        model = with_slices(load(folder / "bf16.base.safetensors", dtype=torch.bfloat16), "bf16", number)
        yield f"bf16, {list(SETS)[number]}, sampled latents", *compared([sampled(model)], [expected])


def merged(folder: Path):
    """A slice on one of two models that are merged behind it."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    for place in ("first", "second"):
        found = []
        for with_node in (True, False):
            name = "bf16.base.safetensors" if with_node else applied(folder, "bf16", 0).name
            own, other = (load(folder / path, dtype=torch.bfloat16) for path in (name, "bf16.other.safetensors"))
            own = with_slices(own, "bf16", 0) if with_node else own
            pair = (own, other) if place == "first" else (other, own)
            found.append(resident(ModelMergeSimple().merge(*pair, 0.25)[0]))
        yield f"bf16, a slice on the {place} of two merged models", *compared(*found)


def sampled(model) -> torch.Tensor:
    """Latents by ComfyUI's own sampler, which loads the model itself."""
    import comfy.sample

    draw = torch.Generator().manual_seed(7)
    noise, text = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(1, 512, 4096, generator=draw)
    condition = [[text, {}]]
    blank = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, 3, 1.0, "euler", "simple", condition, condition, blank, seed=1)


def quantised(folder: Path, gguf: Path | None):
    """How far outputs are from those of the same quantised base with exact slices, beside what the slices changed."""
    base = folder / "bf16.base.safetensors"
    fp8 = load(base, dtype=torch.float8_e4m3fn)
    yield from distances("fp8 base", fp8, folder)
    if gguf:
        for kind in ("Q8_0", "Q4_0"):
            yield from distances(f"GGUF {kind} base", load_gguf(base, kind, gguf), folder)


def distances(name: str, base, folder: Path):
    before = plain_output(base, folder)
    model = with_slices(base, "bf16", 1)
    after = plain_output(base, folder, slices=True)
    found = output(model).float()
    model.unpatch_model(torch.device("cpu"))
    error, taught = (((a - after).norm() / after.norm()).item() for a in (found, before))
    yield f"{name}, two slices", f"output off by {error:.1e}, the slices change it by {taught:.2g}", error < taught / 4


def plain_output(base, folder: Path, slices: bool = False) -> torch.Tensor:
    """Of the dequantised base in bf16, with the slices' own values written into it or not."""
    plain = load(folder / "bf16.base.safetensors", dtype=torch.bfloat16)
    for key, target in plain.model.named_parameters():
        target.data.copy_(dequantised(base, key))
    if slices:
        from wan_slices_contract import slice_units

        for name in ("one", "two"):
            from safetensors.torch import load_file

            ffid = 1 + (name == "two")
            for matrix, values in load_file(folder / f"bf16.{name}.slice.safetensors").items():
                weight = plain.model.diffusion_model.get_parameter(matrix).data
                slice_units(matrix, weight.shape, "0.02", ffid).write(weight, values)
    return output(plain).float()


def dequantised(base, key: str) -> torch.Tensor:
    owner, _, name = key.rpartition(".")
    weight = getattr(base.model.get_submodule(owner), name)
    module = base.model.get_submodule(owner)
    if hasattr(module, "get_weight"):  # ComfyUI-GGUF
        return module.get_weight(weight, torch.float32)
    return weight.float()


def load_gguf(base: Path, kind: str, extension: Path):
    import folder_paths
    import gguf
    import nodes
    from safetensors.torch import load_file

    if "UnetLoaderGGUF" not in nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(nodes.load_custom_node(str(extension)))
    path = base.with_name(f"{kind}.gguf")
    writer = gguf.GGUFWriter(path, "wan")
    quantisation = getattr(gguf.GGMLQuantizationType, kind)
    for name, weight in load_file(base).items():
        data = weight.float().numpy()
        if is_block_matrix(f".{name}"):
            writer.add_tensor(name, gguf.quants.quantize(data, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder_paths.add_model_folder_path("diffusion_models", str(base.parent))
    return nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(path.name)[0]


def refused(folder: Path):
    """Files that do not belong on a model, and what the error box says."""
    import nodes

    cases = [
        ("a checkpoint", "bf16.base", "bf16.base.safetensors", "whole checkpoint"),
        ("a LoRA", "bf16.base", "bf16.lora.safetensors", "is a LoRA"),
        ("another base", "bf16.other", "bf16.one.slice.safetensors", "was trained on"),
        ("a base that has it", "bf16.applied0", "bf16.one.slice.safetensors", "already"),
        ("contract 2", "bf16.base", contract_2(folder), "contract 2"),
        ("a damaged file", "bf16.base", damaged(folder), "is damaged"),
        ("a merge of two models", "merged", "bf16.one.slice.safetensors", "merged before this node"),
    ]
    for what, base, name, told in cases:
        model = two_merged(folder) if base == "merged" else load(folder / f"{base}.safetensors", dtype=torch.bfloat16)
        try:
            nodes.NODE_CLASS_MAPPINGS["LoadWanSlice"]().load(model, name, 1.0)
            message = "taken"
        except ValueError as error:
            message = str(error)
        yield f"{what} is refused", message, told in message and "\n" not in message


def two_merged(folder: Path):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    pair = (load(folder / f"bf16.{name}.safetensors", dtype=torch.bfloat16) for name in ("base", "other"))
    return ModelMergeSimple().merge(*pair, 0.5)[0]


def contract_2(folder: Path) -> str:
    path = folder / "models" / "slices" / "contract2.safetensors"
    held = (folder / "bf16.one.slice.safetensors").read_bytes()
    path.write_bytes(held.replace(b'\\"contract\\": 1', b'\\"contract\\": 2'))
    return path.name


def damaged(folder: Path) -> str:
    path = folder / "models" / "slices" / "damaged.safetensors"
    path.write_bytes((folder / "bf16.one.slice.safetensors").read_bytes()[:-1])
    return path.name


def contract_module() -> None:
    """The contract's file under a name of its own, since `utils` is ComfyUI's here."""
    spec = importlib.util.spec_from_file_location("wan_slices_contract", ROOT / "utils" / "selective_finetune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    contract_module()
    main()

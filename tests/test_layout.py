"""The map of the house: imports run only downward, the patch stands alone, wan knows no training."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"wan_train_network", "wan_generate_video", "wan_cache_latents", "wan_cache_text_encoder_outputs", "utils.slices"},
    {"utils.cli_train", "utils.cli_generate", "utils.cli_cache", "utils.cli"},
    {"utils.training", "utils.generation", "utils.caching"},
]
JOBS = LAYERS[2]
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("wan/*.py")])


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name):
    numbers = [number for number, modules in enumerate(LAYERS) if name in modules]
    return numbers[0] if numbers else 5 if name.split(".")[0] == "wan" else 4


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_only_downward(path):
    ours = {module_name(module) for module in MODULES}
    for imported in ours & set(imports(path)):
        assert layer(imported) >= layer(module_name(path)), f"{module_name(path)} imports {imported}"
        assert not {imported, module_name(path)} <= JOBS, f"the job {module_name(path)} imports the job {imported}"


def test_the_patch_needs_torch_and_numpy_alone():
    used = {name.split(".")[0] for name in imports(ROOT / "utils" / "selective_finetune.py")}
    assert {"utils", "wan", "diffusers", "transformers", "accelerate", "einops"}.isdisjoint(used)


# Copying the patch into another trainer has to be enough, so its files and musubi-tuner's protocol are in it too.
@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "selective_finetune"], ids=module_name)
def test_a_file_has_at_most_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_training_core_imports_without_optional_libraries():
    core = ["wan.model", "wan.loading", "utils.selective_finetune", "utils.block_swap", "utils.flow_matching"]
    reached, todo = set(), [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in core]
    while todo:
        names = set(imports(todo.pop())) - reached
        reached |= names
        todo += [path for path in MODULES if module_name(path) in names]
    assert {"diffusers", "av", "bitsandbytes"}.isdisjoint(name.split(".")[0] for name in reached)

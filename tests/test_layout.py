"""The map of the house: imports run only downward, the patch stands alone, wan knows no training."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom; a folder or file imports what stands on lower steps, and within its own folder.
STEPS = (
    {"wan_train_network", "wan_generate_video", "wan_cache_latents", "wan_cache_text_encoder_outputs"}
    | {"utils.slices.__main__", "comfyui_wan_slices"},
    {"utils.cli"},
    {"utils.training", "utils.generation", "utils.caching"},
    {"utils.run", "utils.training_debug", "utils.generating"},
    {"utils.preserve"},
    {"utils.swap"},
    {"utils.data", "utils.sampling", "utils.slices"},
    {"utils.learning", "utils.text_files", "utils.pixels"},
    {"utils.locks"},
    {"utils.files", "utils.devices", "utils.interrupts", "utils.musubi_network"},
    {"utils.slice_saving"},
    {"utils.selective_finetune"},
    {"wan"},
)
BESIDE = {("utils.run", "utils.training_debug")}  # of one step, and yet one imports the other
FOLDERS = ("utils/**", "wan/**", "comfyui_wan_slices")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))])


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}
ROOMS = {name for names in STEPS for name in names}


def imports(path):
    """The modules that a file imports, anywhere in it; of `from a import b` both a and a.b."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room(module):
    """The folder or file of STEPS that a module stands in."""
    return max((name for name in ROOMS if f"{module}.".startswith(f"{name}.")), key=len)


def step(module):
    return next(number for number, names in enumerate(STEPS) if room(module) in names)


def problem(importing, imported):
    """What is wrong with one module of ours importing another; None if nothing is."""
    here, there = room(importing), room(imported)
    if here == there or (here, there) in BESIDE:
        return None
    return None if step(importing) < step(imported) else f"{importing} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"utils"}))
def test_imports_run_only_downward(module):
    imported = [name for name in imports(MODULES[module]) if name in MODULES and name != "utils"]
    assert [found for name in imported if (found := problem(module, name))] == []


@pytest.mark.parametrize(
    ("importing", "imported"),
    [
        ("utils.swap.placement", "utils.run.save_schedule"),
        ("utils.data.items", "utils.slices.ledger"),
        ("utils.training", "utils.generation"),
        ("utils.training_debug", "utils.run.turns"),
        ("wan.model", "utils.files"),
        ("utils.selective_finetune", "utils.slice_saving"),
    ],
)
def test_an_import_that_climbs_or_crosses_is_found(importing, imported):
    assert problem(importing, imported)


def test_every_room_of_the_map_exists():
    assert {name for name in ROOMS if not any(f"{module}.".startswith(f"{name}.") for module in MODULES)} == set()


def test_the_patch_needs_torch_and_numpy_alone():
    used = {name.split(".")[0] for name in imports(MODULES["utils.selective_finetune"])}
    assert {"utils", "wan", "diffusers", "transformers", "accelerate", "einops"}.isdisjoint(used)


def test_the_comfyui_nodes_import_nothing_of_ours_but_their_own_folder():
    nodes = [name for name in MODULES if name.startswith("comfyui_wan_slices")]
    ours = {name.split(".")[0] for node in nodes for name in imports(MODULES[node])}
    assert len(nodes) == 6 and {"utils", "wan"}.isdisjoint(ours)


LONGEST = {"utils.selective_finetune": 380, "utils.slice_saving": 280, "utils.musubi_network": 130}  # lines


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_stays_short_enough_to_read(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST.get(module, 420)


def test_the_training_core_imports_without_optional_libraries():
    reached = set()
    todo = ["wan.model", "wan.loading", "utils.selective_finetune", "utils.swap.placement"]
    todo += ["utils.learning.flow_matching"]
    while todo:
        names = set(imports(MODULES[todo.pop()])) - reached
        reached |= names
        todo += names & MODULES.keys()
    assert {"diffusers", "av", "bitsandbytes"}.isdisjoint(name.split(".")[0] for name in reached)

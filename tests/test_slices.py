"""The slices command: byte for byte what training one concept after the other gives, in any order, and back again."""

import json
import re
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chain import METADATA, names_of, train_concept, write_base, write_chain

from utils.cli.slices import main
from utils.selective_finetune import slice_indices
from utils.slices import commands
from utils.slices.commands import verify
from utils.slices.ledger import Entry, read_ledger
from utils.slices.listing import ListedFile, as_json
from wan.errors import InputError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def slices(files, tmp_path):
    """Runs a command in which {name} is a file of the chain; outputs go to the test's folder."""

    def run(command: str):
        paths = {path.name.removesuffix(".safetensors").replace(".", "_"): path for path in files.iterdir()}
        main([word.format(out=tmp_path, **paths) for word in command.split()])

    return run


def same_tensors(a, b):
    one, other = load_file(a), load_file(b)
    assert list(one) == list(other)
    return all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@pytest.mark.parametrize("order", list(permutations(["one_slice", "two_slice"])))
def test_slices_applied_in_any_order_are_the_chained_checkpoint_byte_for_byte(slices, files, tmp_path, order):
    slices(f"apply {{base}} {{{order[0]}}} {{{order[1]}}} -o {{out}}/both.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == (files / "two.safetensors").read_bytes()


def test_a_slice_goes_on_top_of_a_checkpoint_that_holds_another(slices, files, tmp_path):
    slices("apply {one} {two_slice} -o {out}/both.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == (files / "two.safetensors").read_bytes()


@pytest.mark.parametrize("steps", [*permutations(["one", "two", "three"]), ["two", "one three"], ["one three", "two"]])
def test_slices_applied_in_any_number_of_steps_are_the_chained_checkpoint_byte_for_byte(slices, files, tmp_path, steps):
    train_concept(files / "two.safetensors", tmp_path, "three", "0.05", 3)
    paths = {name: folder / f"{name}.slice.safetensors" for name, folder in
             (("one", files), ("two", files), ("three", tmp_path))}  # fmt: skip
    base = files / "base.safetensors"
    for number, step in enumerate(steps):
        out = tmp_path / f"{number}.safetensors"
        slices(f"apply {base} {' '.join(str(paths[name]) for name in step.split())} -o {out}")
        base = out
    assert base.read_bytes() == (tmp_path / "three.safetensors").read_bytes()


def test_what_an_older_run_alone_told_is_told_whatever_the_order(slices, files, tmp_path):
    told = {**metadata_of(files / "one.slice.safetensors"), "ss_training_comment": "first"}
    save_file(load_file(files / "one.slice.safetensors"), tmp_path / "noted.safetensors", told)
    slices("apply {base} {out}/noted.safetensors {two_slice} -o {out}/both.safetensors")
    slices("apply {base} {two_slice} -o {out}/two.safetensors")
    slices("apply {out}/two.safetensors {out}/noted.safetensors -o {out}/steps.safetensors")
    assert (tmp_path / "steps.safetensors").read_bytes() == (tmp_path / "both.safetensors").read_bytes()
    found = metadata_of(tmp_path / "both.safetensors")
    assert (found["ss_output_name"], found["ss_training_comment"]) == ("two", "first")


FOREIGN = {
    "num_heads": "2",
    "text_len": "3",
    "format": "tf",
    "wan_answers": "x",
    "ss_seed": "3",
    "modelspec.title": "t",
}


@pytest.mark.parametrize(
    "command",
    ["apply {base} {out}/odd.safetensors", "scale {out}/odd.safetensors 2 --base {base}",
     "to-lora {out}/odd.safetensors --base {base}", "remove {out}/odd_checkpoint.safetensors one --base {base}",
     "remove {out}/odd_checkpoint.safetensors two --base {base}"],
)  # fmt: skip
def test_only_descriptions_go_with_a_slice_and_not_what_the_model_is(slices, files, tmp_path, command):
    save_file(load_file(files / "one.slice.safetensors"), tmp_path / "odd.safetensors",
              {**metadata_of(files / "one.slice.safetensors"), **FOREIGN})  # fmt: skip
    save_file(load_file(files / "two.safetensors"), tmp_path / "odd_checkpoint.safetensors",
              {**metadata_of(files / "two.safetensors"), **FOREIGN})  # fmt: skip
    slices(f"{command} -o {{out}}/a.safetensors")
    found = metadata_of(tmp_path / "a.safetensors")
    kept = METADATA if command.startswith(("apply", "remove")) else {}
    assert {key: found.get(key) for key in FOREIGN if "." not in key and key != "ss_seed"} == {
        "num_heads": None, "text_len": None, "format": None, "wan_answers": None, **kept
    }  # fmt: skip
    assert ("modelspec.title" in found) == (" two " not in command)


def test_only_descriptions_go_into_an_extracted_slice(slices, files, tmp_path):
    save_file(load_file(files / "one.safetensors"), tmp_path / "odd.safetensors",
              {**metadata_of(files / "one.safetensors"), **FOREIGN})  # fmt: skip
    slices("extract {out}/odd.safetensors --base {base} -o {out}")
    assert metadata_of(tmp_path / "one.slice.safetensors").keys() == {
        "wan_slices", "ss_output_name", "ss_seed", "modelspec.title"
    }  # fmt: skip


def test_an_extracted_slice_is_the_saved_one(slices, files, tmp_path):
    slices("extract {two} --base {base} -o {out}")
    assert names_of(tmp_path) == {"one.slice.safetensors", "two.slice.safetensors"}
    for name in names_of(tmp_path):
        assert same_tensors(tmp_path / name, files / name)
        assert metadata_of(tmp_path / name)["wan_slices"] == metadata_of(files / name)["wan_slices"]
    assert (tmp_path / "two.slice.safetensors").read_bytes() == (files / "two.slice.safetensors").read_bytes()
    main(["apply", str(files / "base.safetensors"), *map(str, sorted(tmp_path.iterdir())), "-o",
          str(tmp_path / "again.safetensors")])  # fmt: skip
    assert (tmp_path / "again.safetensors").read_bytes() == (files / "two.safetensors").read_bytes()


def test_slices_are_extracted_into_a_new_folder_and_over_no_file(slices, tmp_path):
    slices("extract {one} --base {base} -o {out}/new/slices")
    path = tmp_path / "new" / "slices" / "one.slice.safetensors"
    path.write_bytes(b"another")
    with pytest.raises(InputError, match="already exists: choose another output, or add --overwrite"):
        slices("extract {one} --base {base} -o {out}/new/slices")
    assert path.read_bytes() == b"another"
    slices("extract {one} --base {base} -o {out}/new/slices --overwrite")
    assert path.read_bytes() != b"another"
    with pytest.raises(InputError, match="cannot be made"):
        slices(f"extract {{one}} --base {{base}} -o {path}")


OVER = {
    "apply": "apply {base} {one_slice}",
    "remove": "remove {one} one --base {base}",
    "scale": "scale {one_slice} 2 --base {base}",
    "to-lora": "to-lora {one_slice} --base {base}",
}


@pytest.mark.parametrize("command", OVER.values(), ids=OVER)
def test_a_file_that_is_there_is_replaced_only_if_told(slices, tmp_path, command):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"another")
    with pytest.raises(InputError, match=r"a\.safetensors already exists: .* add --overwrite to replace it"):
        slices(f"{command} -o {path}")
    assert path.read_bytes() == b"another"
    slices(f"{command} -o {path} --overwrite")
    assert load_file(path)


def test_names_that_differ_by_case_alone_are_two_files_everywhere(slices, files, tmp_path):
    train_concept(files / "one.safetensors", tmp_path, "One", "0.03", 1)
    slices("extract {out}/One.safetensors --base {base} -o {out}/slices")
    assert names_of(tmp_path / "slices") == {
        "one-ff0.05-ffid2.slice.safetensors",
        "One-ff0.03-ffid1.slice.safetensors",
    }


def test_only_what_the_base_does_not_hold_is_extracted_or_what_is_named(slices, tmp_path):
    slices("extract {two} --base {one} -o {out}")
    assert names_of(tmp_path) == {"two.slice.safetensors"}
    slices("extract {two} --base {base} --name one 0.03:1 one -o {out} --overwrite")
    assert names_of(tmp_path) == {"one.slice.safetensors", "two.slice.safetensors"}
    with pytest.raises(InputError, match=r"has no slice three; there are: one \(ff 0\.05 ffid 2\)"):
        slices("extract {two} --base {base} --name three -o {out}")


@pytest.mark.parametrize(("name", "left"), [("one", "two_slice"), ("two", "one_slice")])
def test_a_removed_slice_leaves_the_checkpoint_as_if_it_was_never_trained(slices, tmp_path, name, left):
    slices(f"remove {{two}} {name} --base {{base}} -o {{out}}/less.safetensors")
    slices(f"apply {{base}} {{{left}}} -o {{out}}/never.safetensors")
    assert same_tensors(tmp_path / "less.safetensors", tmp_path / "never.safetensors")
    (entry,) = json.loads(metadata_of(tmp_path / "less.safetensors")["wan_slices"])
    assert entry["name"] == left.removesuffix("_slice")


def test_without_its_only_slice_a_checkpoint_is_its_base_byte_for_byte(slices, files, tmp_path):
    slices("remove {one} one --base {base} -o {out}/less.safetensors")
    assert same_tensors(tmp_path / "less.safetensors", files / "base.safetensors")
    assert metadata_of(tmp_path / "less.safetensors") == METADATA


@pytest.mark.parametrize(
    ("name", "base", "run"), [("one", "base", "two"), ("two", "base", None), ("two", "one", "one")]
)
def test_without_a_slice_the_metadata_are_those_of_the_newest_run_that_is_left_or_the_bases(
    slices, tmp_path, name, base, run
):
    slices(f"remove {{two}} {name} --base {{{base}}} -o {{out}}/less.safetensors")
    told = metadata_of(tmp_path / "less.safetensors")
    assert told.get("ss_output_name") == run and told["num_heads"] == METADATA["num_heads"]


@pytest.mark.parametrize("strength", ["0", "0.5", "1", "-1", "2.5"])
def test_a_strength_is_a_factor_on_what_was_learned(slices, files, tmp_path, strength):
    slices(f"apply {{base}} {{one_slice}} --strength {strength} -o {{out}}/applied.safetensors")
    slices(f"scale {{one_slice}} {strength} --base {{base}} -o {{out}}/scaled.safetensors")
    slices("apply {base} {out}/scaled.safetensors -o {out}/again.safetensors")
    assert same_tensors(tmp_path / "applied.safetensors", tmp_path / "again.safetensors")
    base, one, found = (load_file(p) for p in (files / "base.safetensors", files / "one.safetensors",
                                               tmp_path / "applied.safetensors"))  # fmt: skip
    for name in base:
        moved = base[name].float() + float(strength) * (one[name].float() - base[name].float())
        assert torch.equal(found[name], moved.bfloat16()), name
    ends = {"0": "base", "1": "one"}
    assert strength not in ends or same_tensors(
        tmp_path / "applied.safetensors", files / f"{ends[strength]}.safetensors"
    )


def test_a_slice_that_is_scaled_again_says_that_its_values_are_only_near_that_strength(slices, tmp_path, capsys):
    slices("scale {one_slice} 0.5 --base {base} -o {out}/half.safetensors")
    slices("scale {out}/half.safetensors 1 --base {base} -o {out}/same.safetensors")
    slices("scale {out}/half.safetensors 2 --base {base} -o {out}/back.safetensors")
    slices("apply {base} {out}/back.safetensors -o {out}/applied.safetensors")
    told = {name: read_ledger(metadata_of(tmp_path / f"{name}.safetensors"), name)[0] for name in
            ("half", "same", "back", "applied")}  # fmt: skip
    assert {name: (e.strength, e.rescaled) for name, e in told.items()} == {
        "half": (0.5, False), "same": (0.5, False), "back": (1, True), "applied": (1, True),
    }  # fmt: skip
    capsys.readouterr()
    slices("list {out}/back.safetensors")
    assert "  1 rescaled\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["apply {base} {one_slice} --strength 999", "scale {one_slice} 999 --base {base}"])
def test_a_strength_that_leaves_the_numbers_is_refused(slices, files, tmp_path, command):
    weights = load_file(files / "one.slice.safetensors")
    weights["blocks.1.ffn.2.weight"][-1] = 3e38
    save_file(weights, tmp_path / "big.slice.safetensors", metadata_of(files / "one.slice.safetensors"))
    command = command.replace("{one_slice}", "{out}/big.slice.safetensors")
    with pytest.raises(InputError, match=r"strength 999 makes values that torch\.bfloat16 cannot hold"):
        slices(f"{command} -o {{out}}/a.safetensors")
    assert names_of(tmp_path) == {"big.slice.safetensors"}


def test_a_strength_that_no_reader_takes_is_refused(slices, tmp_path):
    slices("scale {one_slice} 1000 --base {base} -o {out}/b.safetensors")
    slices("scale {out}/b.safetensors 1000 --base {base} -o {out}/a.safetensors")
    for command in ("scale {out}/a.safetensors 2 --base {base}", "apply {base} {out}/a.safetensors --strength -1.1"):
        with pytest.raises(InputError, match="the largest strength is 1,000,000"):
            slices(f"{command} -o {{out}}/c.safetensors")
    slices("list {out}/a.safetensors")


def test_each_slice_has_its_own_strength(slices, tmp_path, files):
    slices("apply {base} {one_slice} {two_slice} --strength 1 0 -o {out}/a.safetensors")
    assert same_tensors(tmp_path / "a.safetensors", files / "one.safetensors")
    entries = json.loads(metadata_of(tmp_path / "a.safetensors")["wan_slices"])
    assert [entry.get("strength") for entry in entries] == [None, 0.0]
    with pytest.raises(InputError, match="one number, or one for each of the 2 slices"):
        slices("apply {base} {one_slice} {two_slice} --strength 1 0 1 -o {out}/a.safetensors")


def test_overlapping_slices_are_refused_with_the_share_and_the_next_id(slices, files, tmp_path):
    train_concept(files / "base.safetensors", tmp_path, "over", "0.1", 1)
    with pytest.raises(InputError, match=r"one \(ff 0\.05 ffid 2\), which has 50 % of .*Leave out"):
        slices("apply {base} {one_slice} {out}/over.slice.safetensors -o {out}/a.safetensors")
    with pytest.raises(InputError, match="already holds one"):
        slices("apply {one} {one_slice} -o {out}/a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_two_overlapping_slices_are_told_by_their_files(slices, files, tmp_path):
    train_concept(files / "base.safetensors", tmp_path, "over", "0.1", 1)
    with pytest.raises(InputError) as error:
        slices("apply {base} {out}/over.slice.safetensors {one_slice} -o {out}/a.safetensors")
    one, over = files / "one.slice.safetensors", tmp_path / "over.slice.safetensors"
    assert str(error.value).startswith(f"{one} already holds one") and f"Leave out {over}, or {one}" in str(error.value)
    assert "--ffid" not in str(error.value)


def test_a_slice_that_was_trained_over_others_goes_on_top_of_them_and_off_again_byte_for_byte(slices, files, tmp_path):
    train_concept(files / "two.safetensors", tmp_path, "over", "0.1", 1)
    slices("apply {two} {out}/over.slice.safetensors -o {out}/applied.safetensors")
    slices("remove {out}/over.safetensors over --base {two} -o {out}/less.safetensors")
    slices("extract {out}/over.safetensors --base {two} -o {out}/slices")
    slices("apply {two} {out}/slices/over.slice.safetensors -o {out}/again.safetensors")
    whole = (tmp_path / "over.safetensors").read_bytes()
    assert (tmp_path / "applied.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes() == whole
    assert (tmp_path / "less.safetensors").read_bytes() == (files / "two.safetensors").read_bytes()


def test_a_slice_that_was_trained_over_others_goes_only_where_they_are_as_it_knew_them(slices, files, tmp_path):
    train_concept(files / "two.safetensors", tmp_path, "over", "0.1", 1)
    for on, holder in (("one", "one"), ("one} {two_slice", "one"), ("base} {one_slice} {two_slice", "one.slice")):
        with pytest.raises(InputError, match=rf"{holder}\.safetensors already holds one \(ff 0\.05 ffid 2\)"):
            slices(f"apply {{{on}}} {{out}}/over.slice.safetensors -o {{out}}/a.safetensors")
    for command in ("remove {out}/over.safetensors over --base {one} -o {out}/a.safetensors",
                    "remove {out}/over.safetensors two --base {two} -o {out}/a.safetensors",
                    "extract {out}/over.safetensors --base {one} -o {out}"):  # fmt: skip
        with pytest.raises(InputError, match="cannot be told apart"):
            slices(command)
    assert names_of(tmp_path) == {"over.safetensors", "over.slice.safetensors"}


def test_another_base_is_refused_by_its_identity(slices, tmp_path):
    write_base(tmp_path / "other.safetensors", seed=1)
    for command in ("apply {out}/other.safetensors {one_slice}", "scale {one_slice} 2 --base {out}/other.safetensors",
                    "to-lora {one_slice} --base {out}/other.safetensors",
                    "remove {one} one --base {out}/other.safetensors"):  # fmt: skip
        with pytest.raises(InputError, match="is not the base of"):
            slices(f"{command} -o {{out}}/a.safetensors")
    with pytest.raises(InputError, match="is not the base of"):
        slices("extract {one} --base {out}/other.safetensors -o {out}")
    assert names_of(tmp_path) == {"other.safetensors"}


def test_a_base_that_differs_where_no_slice_lies_is_another_base(slices, files, tmp_path):
    weights = load_file(files / "base.safetensors")
    weights["head.head.bias"][0] += 1
    save_file(weights, tmp_path / "touched.safetensors", METADATA)
    with pytest.raises(InputError, match=r"is not the base of .*its identity is"):
        slices("apply {out}/touched.safetensors {one_slice} -o {out}/a.safetensors")


def merged(files, path):
    """The base with one value changed in the slice `one`: its identity stays the same."""
    weights = load_file(files / "base.safetensors")
    name = "blocks.1.ffn.2.weight"
    weights[name].view(-1)[slice_indices(name, weights[name].shape, "0.05", 2)[-1]] += 1
    save_file(weights, path, METADATA)


def test_a_base_that_was_merged_or_finetuned_is_told_by_the_values_at_the_slice(slices, files, tmp_path):
    merged(files, tmp_path / "merged.safetensors")
    for command in ("apply {out}/merged.safetensors {one_slice}", "scale {one_slice} 2 --base {out}/merged.safetensors",
                    "remove {one} one --base {out}/merged.safetensors"):  # fmt: skip
        with pytest.raises(InputError, match="holds other values where the slice lies"):
            slices(f"{command} -o {{out}}/a.safetensors")
    assert names_of(tmp_path) == {"merged.safetensors"}
    slices("apply {out}/merged.safetensors {two_slice} -o {out}/a.safetensors")  # it lies elsewhere


@pytest.mark.parametrize(
    "command", ["verify {one}", "remove {one} one -o {out}/a.safetensors", "extract {one} -o {out}/b"]
)
def test_a_base_in_fp8_is_refused_before_anything_is_read(slices, files, tmp_path, command, monkeypatch):
    weights = load_file(files / "base.safetensors")
    weights = {n: w.to(torch.float8_e4m3fn) if re.search(r"blocks.*\d\.weight", n) else w for n, w in weights.items()}
    save_file(weights, tmp_path / "fp8.safetensors", METADATA)
    for reader in ("read_slice", "base_identity", "_bytes"):
        monkeypatch.setattr(commands, reader, None)
    with pytest.raises(InputError, match=r"fp8\.safetensors: blocks\..* is F8_E4M3, and slices lie in BF16, F16, F32"):
        slices(f"{command} --base {{out}}/fp8.safetensors")
    assert names_of(tmp_path) == {"fp8.safetensors"}


@pytest.mark.parametrize("known", [[], ["base"], ["start"]])
def test_a_slice_that_does_not_tell_its_base_is_used_with_a_note(slices, files, tmp_path, known, capsys):
    told = metadata_of(files / "one.slice.safetensors")
    (entry,) = json.loads(told["wan_slices"])
    entry = {key: value for key, value in entry.items() if key not in {"base", "start"} - set(known)}
    save_file(load_file(files / "one.slice.safetensors"), tmp_path / "old.safetensors",
              {**told, "wan_slices": json.dumps([entry])})  # fmt: skip
    for command in ("apply {base} {out}/old.safetensors", "scale {out}/old.safetensors 2 --base {base}",
                    "to-lora {out}/old.safetensors --base {base}"):  # fmt: skip
        slices(f"{command} -o {{out}}/a.safetensors --overwrite")
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        wanted = f"note: {tmp_path}/old.safetensors does not record its base, so it cannot be checked that this is "
        assert notes == ([] if known else [f"{wanted}{files}/base.safetensors"])


def test_a_base_with_a_prefix_is_the_same_base(slices, files, tmp_path):
    write_base(tmp_path / "comfy.safetensors", prefix="model.diffusion_model.")
    slices("apply {out}/comfy.safetensors {one_slice} -o {out}/a.safetensors")
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(files / "one.safetensors")
    assert all(torch.equal(ours[f"model.diffusion_model.{name}"], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bases_of_other_dtypes_chain_alike(tmp_path, dtype):
    write_base(tmp_path / "base.safetensors", dtype)
    train_concept(tmp_path / "base.safetensors", tmp_path, "one", "0.05", 2, compute=torch.bfloat16)
    slice_file, out = tmp_path / "one.slice.safetensors", tmp_path / "a.safetensors"
    assert {tensor.dtype for tensor in load_file(slice_file).values()} == {dtype}
    main(["apply", str(tmp_path / "base.safetensors"), str(slice_file), "-o", str(out)])
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_a_checkpoint_is_verified_against_its_base(slices, files, tmp_path, capsys):
    slices("verify {two} --base {base}")
    assert "with one (ff 0.05 ffid 2), two (ff 0.03 ffid 1), byte for byte" in capsys.readouterr().out
    weights = load_file(files / "two.safetensors")
    weights["blocks.2.cross_attn.o.weight"][0, 0] += 1
    weights["head.head.bias"][:2] += 1
    save_file(weights, tmp_path / "touched.safetensors", metadata_of(files / "two.safetensors"))
    with pytest.raises(InputError, match="2 differences"):
        slices("verify {out}/touched.safetensors --base {base}")
    told = capsys.readouterr().out
    assert "head.head.bias differs in 2 of its 64 values outside the slices" in told
    assert "blocks.2.cross_attn.o.weight differs in 1 of its 2,304 values" in told


def test_verifying_on_another_base_tells_what_differs(slices, files, tmp_path, capsys):
    merged(files, tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match="1 differences"):
        slices("verify {one} --base {out}/merged.safetensors")
    assert "one (ff 0.05 ffid 2) was trained on other values than the base holds" in capsys.readouterr().out


def test_a_slice_that_was_trained_over_another_is_verified(slices, files, tmp_path, capsys):
    train_concept(files / "one.safetensors", tmp_path, "over", "0.1", 1)
    slices("verify {out}/over.safetensors --base {base}")
    assert "byte for byte" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["base", "one"])
def test_a_slice_that_was_trained_further_is_verified(slices, files, tmp_path, base, capsys):
    train_concept(files / "one.safetensors", tmp_path, "more", "0.05", 2)
    slices(f"verify {{out}}/more.safetensors --base {{{base}}}")
    assert "byte for byte" in capsys.readouterr().out


def test_a_slice_that_any_script_trained_further_is_one_of_all_its_steps_on_the_first_base(slices, files, tmp_path):
    train_concept(files / "two.safetensors", tmp_path, "more", "0.050", 2)
    one, two = read_ledger(metadata_of(files / "two.safetensors"), "two")
    entries = read_ledger(metadata_of(tmp_path / "more.safetensors"), "more")
    assert entries == [two, replace(entries[-1], ff="0.050", ffid=2, steps=40, start=one.start)]
    assert read_ledger(metadata_of(tmp_path / "more.slice.safetensors"), "more") == entries[1:]
    slices("apply {base} {two_slice} {out}/more.slice.safetensors -o {out}/both.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == (tmp_path / "more.safetensors").read_bytes()


def test_a_tensor_without_values_is_verified(tmp_path):
    weights = load_file(write_base(tmp_path / "base.safetensors"))
    save_file({**weights, "nothing": torch.zeros(0, 4)}, tmp_path / "base.safetensors", METADATA)
    assert verify(tmp_path / "base.safetensors", tmp_path / "base.safetensors") == ([], [])


def test_what_another_contract_placed_is_neither_taken_out_nor_verified(slices, files, tmp_path):
    told = metadata_of(files / "one.safetensors")
    told["wan_slices"] = told["wan_slices"].replace('"contract": 1', '"contract": 2')
    save_file(load_file(files / "one.safetensors"), tmp_path / "later.safetensors", told)
    for command in ("remove {out}/later.safetensors one --base {base} -o {out}/a.safetensors",
                    "extract {out}/later.safetensors --base {base} -o {out}",
                    "verify {out}/later.safetensors --base {base}"):  # fmt: skip
        with pytest.raises(InputError, match="follows slice contract 2, this program knows 1"):
            slices(command)
    assert names_of(tmp_path) == {"later.safetensors"}


def test_the_list_is_a_table_with_overlaps_and_free_ids(slices, files, tmp_path, capsys):
    train_concept(files / "base.safetensors", tmp_path, "over", "0.1", 1)
    slices("list {base} {two} {one_slice} {out}/over.slice.safetensors")
    told = capsys.readouterr().out
    assert re.search(r"base\.safetensors +checkpoint +\S+ kB +no ledger", told)
    assert re.search(r"two\.safetensors +checkpoint +\S+ kB +two +0\.03 +1 +10 +20\d\d-\d\d-\d\d +[0-9a-f]{12}", told)
    assert re.search(r"one\.slice\.safetensors +slice +\S+ kB +one +0\.05 +2 +20 ", told)
    assert "overlap: over (ff 0.1 ffid 1) and one (ff 0.05 ffid 2)" in told
    assert "18 of 20 ids at ff 0.05 are free, the next is --ffid 3" in told


def test_slices_of_two_bases_neither_overlap_nor_take_each_others_ids(slices, tmp_path, capsys):
    train_concept(write_base(tmp_path / "other.safetensors", seed=1), tmp_path, "over", "0.05", 2)
    slices("list {one} {out}/over.safetensors")
    told = capsys.readouterr().out
    groups = re.findall(r"on base [0-9a-f]{12}:\nno two of these slices overlap\n19 of 20 ids at ff 0\.05 .*", told)
    assert len(set(groups)) == 2 and "overlap:" not in told
    slices("list {one} {out}/over.safetensors --json")
    bases = json.loads(capsys.readouterr().out)["bases"]
    assert len({group["base"] for group in bases}) == 2
    assert all(group["overlaps"] == [] and group["ids"]["0.05"]["free"] == 19 for group in bases)


def test_a_slice_that_does_not_tell_its_base_may_overlap_those_of_any():
    def files(*entries):
        return [
            ListedFile(Path("a"), "slice", 1, 1, (Entry(1, "0.5", 1, name, 1, "", base),)) for name, base in entries
        ]

    told = as_json(files(("a", "1" * 64), ("b", "2" * 64), ("c", None)))["bases"]
    assert [[labels[0][0] + labels[1][0] for labels in group["overlaps"]] for group in told] == [["ac"], ["bc"]]
    (alone,) = as_json(files(("a", None), ("", None)))["bases"]
    assert alone["base"] is None and len(alone["overlaps"]) == 1


def test_saves_of_one_run_do_not_overlap_and_saves_of_two_do(slices, files, tmp_path, capsys):
    for folder, name in (("epoch", "one"), ("run", "another")):
        (tmp_path / folder).mkdir()
        train_concept(files / "base.safetensors", tmp_path / folder, name, "0.050", 2)
    slices("list {one} {out}/epoch/one.safetensors {two}")
    told = capsys.readouterr().out
    assert "no two of these slices overlap" in told
    assert re.search(
        rf"^{files}/one\.safetensors .*\n{tmp_path}/epoch/one\.safetensors .*\ntwo\.safetensors ", told, re.M
    )
    slices("list {one} {out}/epoch/one.safetensors {out}/run/another.safetensors")
    told = capsys.readouterr().out
    assert re.findall("overlap: (one|another) .* and (one|another) ", told) == [("one", "another")]


def test_the_list_takes_patterns_as_the_shells_of_windows_leave_them(slices, files, tmp_path, capsys):
    for name in ("b.safetensors", "a.safetensors", "a[1].safetensors", "c.txt"):
        shutil.copy(files / "one.safetensors", tmp_path / name)
    slices("list {out}/*.safetensors --json")
    assert [Path(own["path"]).name for own in json.loads(capsys.readouterr().out)["files"]] == [
        "a.safetensors", "a[1].safetensors", "b.safetensors"
    ]  # fmt: skip
    slices("list {out}/a[1].safetensors")
    with pytest.raises(InputError, match=r"no file is called .*/\*\.pt$"):
        slices("list {out}/*.pt")


def test_the_list_as_json_holds_the_same(slices, files, capsys):
    slices("list {two} {one_slice} --json")
    told = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in told["files"][0]["entries"]] == ["one", "two"]
    (on_base,) = told["bases"]
    assert on_base["overlaps"] == [] and on_base["ids"]["0.05"] == {"free": 18, "of": 20, "next": 3}
    assert on_base["base"] == told["files"][0]["entries"][0]["base"]
    assert [file["kind"] for file in told["files"]] == ["checkpoint", "slice"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("apply {base} {one_slice} -o {base}", "is .*base.safetensors, an input: choose"),
        ("apply {base} {one_slice} -o {one_slice}", "an input: choose"),
        ("apply {base} {one_slice} -o {out}/none/a.safetensors", "existing folder"),
        ("apply {base} {one_slice} -o {out}/a.bin", "is not a name for a .safetensors file"),
        ("apply {base} {one} -o {out}/a.safetensors", "is not a slice file"),
        ("apply {base} {out}/none.safetensors -o {out}/a.safetensors", "does not exist"),
        (
            "apply {base} {one_slice} --strength nan -o {out}/a.safetensors",
            "--strength must be a number from -1,000 to 1,000, not nan",
        ),
        ("remove {base} one --base {base} -o {out}/a.safetensors", "has no slice one; there are: none"),
        ("extract {base} --base {base} -o {out}", "has no slice that"),
        ("list {out}", "is a folder"),
        (f"list {'y' * 300}", "cannot be read|does not exist"),
        (f"verify {'y' * 300} --base {{base}}", "cannot be read|does not exist"),
        (f"apply {{base}} {{one_slice}} -o {{out}}/{'y' * 240}.safetensors", "cannot be written"),
        ("apply {base} {one_slice} --strength one -o {out}/a.safetensors", "not one"),
        ("list", "required"),
        ("paint", "paint is not one of list, show, extract"),
    ],
)
def test_mistakes_are_told_in_one_line_and_write_nothing(slices, tmp_path, command, told):
    with pytest.raises(InputError, match=told) as error:
        slices(command)
    assert "\n" not in str(error.value) and not names_of(tmp_path)

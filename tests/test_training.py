"""Training runs of a tiny model: what they learn, write, say, and that a resumed one is the uninterrupted one."""

import shutil
from datetime import timedelta

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chain import LEFT
from tiny_run import ITEMS, ORACLE, flags, run, write_dataset, write_dit, write_inputs, write_sample_models
from torch.nn import functional as F

from utils import training
from utils.cli.train import parse_train
from utils.data.cache_files import image_latents_path, read_latents, read_text, text_path, write_latents, write_text
from utils.data.dataset import TrainingDataset, build_training_dataset
from utils.files import readable
from utils.learning.flow_matching import draw_generator, draw_uniforms, sigmas_of
from utils.locks import sole_writer
from utils.run import preparing, step
from utils.run.opening_lines import plan_line
from utils.run.plan import TrainingPlan
from utils.selective_finetune import SliceError, slice_indices
from wan.errors import InputError
from wan.loading import load_dit
from wan.model import WanModel

FP32, BF16 = ("--mixed_precision", "no"), ("--mixed_precision", "bf16")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sample_flags(files):
    return [*write_sample_models(files), "--vae_dtype", "fp32"]


@pytest.fixture
def folder(files):
    """The run's files, with an output folder of the test's own."""
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def same_tensors(a, b):
    one, other = load_file(a), load_file(b)
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def logged(folder, *more):
    """The scalars of a run, as {name: {step: value}}, without what is measured (memory, time)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.rmtree(folder / "logs", ignore_errors=True)
    run(folder, "--logging_dir", str(folder / "logs"), *more)
    events = EventAccumulator(str(next((folder / "logs").glob("*/*")))).Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith(("memory", "time"))]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_only_the_slice_changes_and_the_rest_keeps_its_bytes(folder, precision):
    run(folder, *precision)
    base, trained = load_file(folder / "base.safetensors"), load_file(folder / "out" / "one.safetensors")
    changed = 0
    for name, before in base.items():
        moved = (before != trained[name]).flatten().nonzero().flatten()
        sliced = "blocks." in name and before.dim() == 2
        allowed = slice_indices(name, before.shape, "0.1", 2) if sliced else torch.empty(0, dtype=torch.long)
        assert torch.isin(moved, allowed).all(), name
        changed += len(moved)
    assert changed > 4000


def test_the_metadata_tells_the_run_and_the_slice(folder):
    run(folder, *BF16, "--training_comment", "hello")
    with safe_open(folder / "out" / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {"num_heads": "4", "ss_steps": "10", "ss_epoch": "2", "ss_seed": "3", "ss_training_comment": "hello"}
    assert expected.items() <= metadata.items()
    assert '"ffid": 2, "name": "one", "steps": 10' in metadata["wan_slices"]


def reference_losses(folder, steps, window):
    """Plain autograd on whole weights, masked to the slice: SGD with the run's own noise, one loss a step."""
    dataset = build_training_dataset(parse_train(flags(folder)).dataset)
    timesteps = parse_train(flags(folder)).timesteps
    model = load_dit(folder / "base.safetensors", torch.float32)
    weights = {n: p.requires_grad_() for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    batches = [(number, batch) for epoch in range(9) for number, batch in enumerate(dataset.epoch_batches(3, epoch))]
    losses, done = [], 0
    while len(losses) < steps:
        size = min(window, 5 - batches[done][0])
        loss = sum(batch_loss(model, dataset[batches[done + i][1]], timesteps, done + i) for i in range(size)) / size
        grads = torch.autograd.grad(loss, list(weights.values()))
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            at = slice_indices(name, weight.shape, "0.1", 2)
            weight.data.view(-1)[at] -= 0.1 * grad.reshape(-1)[at]
        losses.append(loss.item())
        done += size
    return losses


def batch_loss(model, batch, timesteps, place):
    generators = [draw_generator(3, place // 5, entry) for entry in batch["entries"]]
    latents = batch["latents"]
    sigma = sigmas_of(timesteps, draw_uniforms(timesteps, generators, 3, 0), tuple(latents.shape[-2:]))
    noise = torch.stack([torch.randn(latents.shape[1:], generator=own) for own in generators])
    at = sigma.view(-1, 1, 1, 1, 1)
    return F.mse_loss(model((1 - at) * latents + at * noise, 1000 * sigma, batch["t5"]), noise - latents)


@pytest.mark.parametrize(
    ("more", "window"),
    [((), 1), (("--gradient_checkpointing", "--blocks_to_swap", "1"), 1), (("--gradient_accumulation_steps", "3"), 3)],
    ids=["plain", "checkpointed and swapped", "accumulated"],
)
def test_losses_are_those_of_plain_autograd_on_the_whole_weights(folder, more, window):
    sgd = ("--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_grad_norm", "0")
    found = logged(folder, *sgd, *more)["loss/current"]
    steps = {1: 10, 3: 4}[window]
    assert list(found) == list(range(1, steps + 1))
    torch.testing.assert_close(
        torch.tensor(list(found.values())), torch.tensor(reference_losses(folder, steps, window))
    )


OPTIMIZERS = {
    "adamw": ("--optimizer_type", "adamw"),
    "adamw8bit": ("--optimizer_type", "adamw8bit", "--ff", "0.5", "--ffid", "2"),
    "adafactor": ("--optimizer_type", "adafactor", "--gradient_accumulation_steps", "2"),
}


@pytest.mark.parametrize(
    ("optimizer", "step"), [("adamw", 3), ("adamw", 5), ("adamw", 7), ("adamw8bit", 7), ("adafactor", 4)]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, optimizer, step):
    common = [*BF16, *OPTIMIZERS[optimizer], "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--save_state"]
    common += ["--num_timestep_buckets", "3", "--save_every_n_steps", str(step)]
    whole = logged(folder, *common)
    (folder / "out").rename(folder / "whole")
    try:
        state = folder / "whole" / f"one-step{step:08d}-state"
        resumed = logged(folder, *common, "--resume", str(state))
        for name, values in whole.items():  # an epoch's own line comes after the state of its last step
            assert resumed[name] == {at: value for at, value in values.items() if at > step - (name == "loss/epoch")}
        assert same_tensors(folder / "whole" / "one.safetensors", folder / "out" / "one.safetensors")
    finally:
        shutil.rmtree(folder / "whole")


def test_a_state_of_another_run_is_refused_before_the_model_loads(folder, monkeypatch):
    run(folder, "--save_state")
    monkeypatch.setattr(preparing, "load_with_slices", None)
    resume = ("--resume", str(folder / "out" / "one-state"))
    with pytest.raises(InputError, match=r"ffid 2 \(now 3\)"):
        run(folder, *resume, "--ffid", "3")
    with pytest.raises(InputError, match="learning_rate"):
        run(folder, *resume, "--learning_rate", "1")


def test_a_state_of_another_base_is_refused(folder):
    run(folder, "--save_state")
    write_dit(folder / "other.safetensors", seed=1)
    with pytest.raises(InputError, match="base_sha256"):
        run(folder, "--resume", str(folder / "out" / "one-state"), "--dit", str(folder / "other.safetensors"))


def test_a_state_of_the_same_base_with_another_slice_in_it_is_refused(folder):
    other = folder / "other.safetensors"
    run(folder, "--ffid", "1", "--max_train_epochs", "1")
    (folder / "out" / "one.safetensors").rename(other)
    run(folder, "--save_state", "--max_train_epochs", "1")
    with pytest.raises(InputError, match="base_ledger_sha256"):
        run(folder, "--resume", str(folder / "out" / "one-state"), "--dit", str(other))


def test_a_state_of_other_pictures_or_texts_of_the_same_shapes_is_refused(folder, tmp_path):
    shutil.copy(folder / "base.safetensors", tmp_path)
    write_dataset(tmp_path)
    run(tmp_path, "--save_state", "--max_train_epochs", "1")
    latents, text = image_latents_path(tmp_path / "pics", "wide0", (32, 16)), text_path(tmp_path / "pics", "wide1")
    for path, change in (
        (latents, lambda: write_latents(latents, read_latents(latents) + 1, (32, 16))),
        (text, lambda: write_text(text, read_text(text) + 1, "wide1")),
    ):
        before = path.read_bytes()
        change()
        with pytest.raises(InputError, match="another run: dataset_sha256"):
            run(tmp_path, "--resume", "latest")
        path.write_bytes(before)
    run(tmp_path, "--resume", "latest", "--max_train_epochs", "2")


def test_a_complete_run_can_be_continued_with_more_epochs(folder):
    run(folder, "--save_state", "--max_train_epochs", "1")
    resume = ("--resume", str(folder / "out" / "one-state"))
    with pytest.raises(InputError, match="raise --max_train_epochs"):
        run(folder, *resume, "--max_train_epochs", "1")
    assert any("epoch 2, step 5" in line for line in run(folder, *resume))


def test_saves_and_samples_have_their_names(folder, sample_flags):
    saves = ["--save_every_n_epochs", "1", "--save_every_n_steps", "4", "--save_state_on_train_end"]
    samples = ["--sample_at_first", "--sample_every_n_epochs", "2", "--sample_every_n_steps", "5"]
    run(folder, *BF16, *sample_flags, *saves, *samples)
    found = {path.name for path in (folder / "out").iterdir()}
    steps = {"one-step00000004.safetensors", "one-step00000008.safetensors"}
    assert found == {"one-000001.safetensors", *steps, "one.safetensors", "one-state", "sample"}
    assert (folder / "out" / "sample" / "one_contact_sheet.png").is_file()
    pictures = sorted(path.name for path in (folder / "out" / "sample").iterdir() if "sheet" not in path.name)
    parts = [name.split("_") for name in pictures]
    assert [part[1] for part in parts] == ["000005"] * 2 + ["e000000"] * 2 + ["e000002"] * 2
    assert all(pictures[i].endswith("_7_000.png") and pictures[i + 1].endswith(".mp4") for i in (0, 2, 4))


def test_samples_change_nothing_in_the_run(folder, sample_flags):
    run(folder, *BF16)
    (folder / "out" / "one.safetensors").rename(folder / "alone.safetensors")
    run(folder, *BF16, *sample_flags, "--sample_every_n_steps", "2")
    assert same_tensors(folder / "alone.safetensors", folder / "out" / "one.safetensors")


def test_training_draws_nothing_from_the_global_generators(folder):
    before = torch.random.get_rng_state()
    run(folder, *BF16, "--max_data_loader_n_workers", "1", "--persistent_data_loader_workers")
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_item_of_the_run_has_its_own_number(folder, monkeypatch):
    numbers = []

    def record(timesteps, generators, seed, first_item):
        numbers.extend(range(first_item, first_item + len(generators)))
        return draw_uniforms(timesteps, generators, seed, first_item)

    monkeypatch.setattr(step, "draw_uniforms", record)
    run(folder, "--gradient_accumulation_steps", "2")
    assert numbers == list(range(2 * len(ITEMS)))


def test_nothing_is_moved_between_forward_and_loss(folder, monkeypatch):
    events = []

    def recording(owner, name):
        original = getattr(owner, name)

        def record(*args, **kwargs):
            result = original(*args, **kwargs)
            events.append(name)
            return result

        monkeypatch.setattr(owner, name, record)

    recording(torch.Tensor, "to")
    recording(WanModel, "forward")
    recording(step, "flow_loss")
    run(folder)
    after = [events[number + 1] for number, name in enumerate(events) if name == "forward"]
    assert after and set(after) == {"flow_loss"}


def test_a_sample_shows_the_weights_that_are_saved(folder, sample_flags):
    run(folder, *BF16, *sample_flags, "--sample_every_n_epochs", "2")
    after = Image.open(next((folder / "out" / "sample").glob("one_e*.png"))).tobytes()
    shutil.copy(folder / "out" / "one.safetensors", folder / "trained.safetensors")
    shutil.rmtree(folder / "out")
    base = ["--dit", str(folder / "trained.safetensors"), "--ffid", "3"]
    run(folder, *BF16, *sample_flags, *base, "--sample_at_first")
    assert Image.open(next((folder / "out" / "sample").glob("one_e*.png"))).tobytes() == after


def test_the_vae_of_wan_2_2_is_refused_for_samples_before_the_first_step(folder, sample_flags):
    wan22 = load_file(ORACLE / "vae_wan22.safetensors")
    weights = {name.removeprefix("weight."): wan22[name] for name in wan22 if name.startswith("weight.")}
    save_file(weights, folder / "wan22.safetensors")
    with pytest.raises(InputError, match=r"is the Wan 2\.2 VAE .*use the Wan 2\.1 VAE"):
        run(folder, *sample_flags, "--sample_at_first", "--vae", str(folder / "wan22.safetensors"))
    assert list((folder / "out").rglob("*.safetensors")) == []


def test_samples_and_scalars_are_logged(folder, sample_flags):
    scalars = logged(folder, *BF16, *sample_flags, "--sample_every_n_epochs", "1", "--lr_scheduler", "linear")
    assert set(scalars) == {"loss/current", "loss/average", "loss/epoch", "lr/slice", "grad_norm"}
    assert list(scalars["loss/epoch"]) == [5, 10]
    assert scalars["loss/average"][10] == pytest.approx(sum(scalars["loss/current"][i] for i in range(6, 11)) / 5)
    assert [scalars["lr/slice"][step] for step in (1, 6)] == pytest.approx([1e-2, 5e-3])


def test_retention_keeps_the_last_ones(folder):
    keep = ("--save_last_n_epochs", "2", "--save_last_n_epochs_state", "1", "--save_state")
    run(folder, *BF16, "--max_train_epochs", "5", "--save_every_n_epochs", "1", *keep)
    found = sorted(path.name for path in (folder / "out").iterdir())
    checkpoints = ["one-000003.safetensors", "one-000004.safetensors", "one.safetensors"]
    assert found == sorted([*checkpoints, "one-000004-state", "one-state"])


def test_the_start_tells_what_will_happen(folder):
    saves = ("--save_every_n_epochs", "1", "--max_train_epochs", "4")
    lines = "\n".join(run(folder, *BF16, *saves, "--blocks_to_swap", "1"))
    told = ("16x32x1: 5, 32x16x1: 3", "4,908 of 79,632 parameters train (6.1634 %), in 20 matrices of 2 of 2 blocks")
    told += ("20 steps: 4 epochs of 5 steps, 8 items in 5 batches, 1 batch per step", "9 of 10 ids at ff 0.1 are free")
    size = (folder / "base.safetensors").stat().st_size
    told += (f"will write 4 checkpoints of {readable(size)}", f"{readable(4 * size)} in all", "one on each side of 875")
    told += ("2 blocks (", "stream from the checkpoint file", "base.safetensors: bf16\n")
    assert [part for part in told if part not in lines] == []


def test_a_base_in_another_dtype_is_cast_and_keeps_its_own_in_the_file(folder):
    write_dit(folder / "wide.safetensors", torch.float32)
    lines = run(folder, *BF16, "--dit", str(folder / "wide.safetensors"))
    assert any("fp32, cast to bf16 at load, saved in fp32" in line for line in lines)
    assert {value.dtype for value in load_file(folder / "out" / "one.safetensors").values()} == {torch.float32}


def test_a_second_concept_chains_and_the_ledger_tells_both(folder):
    run(folder, *BF16)
    first = ("--dit", str(folder / "out" / "one.safetensors"), "--output_name", "two", "--max_train_epochs", "1")
    assert any("8 of 10 ids" in line for line in run(folder, *BF16, *first, "--ffid", "5"))


def test_the_timesteps_can_be_shown_and_nothing_is_trained(folder):
    lines = run(folder, "--show_timesteps", "console")
    assert "950-1000" in lines[-1] and not (folder / "out").exists()


def test_what_does_not_fit_is_refused_and_nothing_is_written(folder):
    for more, told in {
        ("--save_precision", "fp32"): "keeps the dtypes of --dit, here bf16",
        ("--blocks_to_swap", "3"): "this model has 2 blocks",
        ("--mixed_precision", "fp16"): "needs a GPU",
        ("--optimizer_type", "muon"): "matrices",
        ("--lr_scheduler", "none"): "unknown",
        (
            "--lr_warmup_steps",
            "50",
            "--lr_scheduler",
            "linear",
        ): "^--lr_warmup_steps 50: the run has only 10 steps; take fewer, or",
        ("--max_timestep", "0.001", "--preserve_distribution_shape"): "widen the range",
    }.items():
        with pytest.raises(InputError, match=told):
            run(folder, *more)
        assert not (folder / "out").exists()


def test_what_a_killed_run_left_is_removed_before_room_is_looked_for(folder, monkeypatch):
    left = folder / "out" / f"one.safetensors{LEFT}"
    left.parent.mkdir(exist_ok=True)
    left.touch()
    room = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=0) if left.exists() else room)
    run(folder, "--max_train_epochs", "1")
    assert (folder / "out" / "one.safetensors").is_file()


def test_an_output_that_is_the_base_is_refused(folder):
    with pytest.raises(InputError, match=r"over .*base"):
        run(folder, "--output_dir", str(folder), "--output_name", "base")


def test_texts_that_do_not_fit_the_model_are_refused(folder, monkeypatch):
    for name, told in (("text_width", "48"), ("longest_text", "8 tokens|at most 8")):
        with monkeypatch.context() as patch:
            patch.setattr(TrainingDataset, name, 100)
            with pytest.raises(InputError, match=told):
                run(folder)


def test_a_slice_that_is_empty_in_the_model_is_refused(folder):
    with pytest.raises(SliceError, match="holds such a slice; take a larger ff"):
        run(folder, "--ff", "1e-9")


@pytest.mark.parametrize(("limit", "norm"), [("0.001", 0.0001), ("0", None)])
def test_the_gradient_is_clipped_to_its_limit_before_the_step(folder, limit, norm):
    flags = ("--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_train_steps", "1", "--save_state_on_train_end")
    run(folder, *flags, "--max_train_epochs", "1", "--gradient_accumulation_steps", "5", "--max_grad_norm", limit)
    trained = torch.load(folder / "out" / "one-state" / "state.pt", weights_only=True)["state"]["trained"]
    moved = torch.cat([values.flatten() for name, values in trained.items() if name.endswith("weight")]).norm().item()
    assert moved == pytest.approx(norm, rel=1e-4) if norm else moved > 0.001


@pytest.mark.parametrize(("flags", "minutes"), [((), 24 * 60), (("--ddp_timeout", "7"), 7)])
def test_processes_wait_a_day_for_what_the_main_one_does_alone(folder, monkeypatch, flags, minutes):
    class Started(Exception):
        pass

    def start(kwargs_handlers, **_):
        raise Started(kwargs_handlers[0].timeout)

    monkeypatch.setattr(training, "Accelerator", start)
    with pytest.raises(Started) as started:
        run(folder, *flags)
    assert started.value.args[0] == timedelta(minutes=minutes)


def test_a_second_run_of_the_same_name_is_refused_while_one_writes(folder):
    (folder / "out").mkdir()
    with (
        sole_writer(folder / "out", "one", "a run", ""),
        pytest.raises(InputError, match=r"--output_name one in .*out"),
    ):
        run(folder)
    run(folder, "--max_train_steps", "1")
    assert not list((folder / "out").glob("*.lock"))


def test_one_epoch_of_one_step_is_not_told_in_the_plural():
    line = plan_line(TrainingPlan(1, 1, 1, 1, 1, 1), 1)
    assert line == "1 step: 1 epoch of 1 step, 1 item in 1 batch, 1 batch per step"

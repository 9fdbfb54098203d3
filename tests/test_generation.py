"""wan_generate_video.py on a tiny Wan in the real file formats: what it saves, what it refuses."""

import io
import json
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import sentencepiece
import torch
from one_sample import sample_prompt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chain import LEFT

from utils import generation
from utils.cli.generate import parse_generate
from utils.sampling.batches import decode_latents
from utils.sampling.denoising import encode_samples, resolve_sample
from utils.sampling.prompts import SamplePrompt
from utils.sampling.writers import to_frames
from utils.selective_finetune import attach_slice
from utils.slice_saving import save_checkpoint, save_slice
from wan.configs import DEFAULT_NEGATIVE_PROMPT, TASKS, WanConfig
from wan.errors import InputError
from wan.loading import load_dit
from wan.model import WanModel
from wan.text_encoder import load_text_encoder
from wan.vae import load_vae
from wan_generate_video import main

ORACLE = Path(__file__).parent / "oracle"
CONFIG = WanConfig(
    "t2v", dim=48, ffn_dim=64, num_heads=4, num_layers=3, in_dim=16, out_dim=16, text_dim=48, text_len=16
)
STEM = r"\d{8}-\d{6}-\d{3}"


def oracle_weights(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(ORACLE / name)
    return {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}


def save_dit(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = WanModel(CONFIG)
    save_file(model.state_dict(), path, metadata={"num_heads": "4", "text_len": "16"})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with dit, high-noise dit, vae, t5 and tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_dit(folder / "dit.safetensors", seed=0)
    save_dit(folder / "high.safetensors", seed=1)
    save_file(oracle_weights("vae_wan21.safetensors"), folder / "vae.safetensors")
    embeddings = torch.randn(512, 48, generator=torch.Generator().manual_seed(0))
    save_file(
        oracle_weights("umt5_encoder.safetensors") | {"token_embedding.weight": embeddings}, folder / "t5.safetensors"
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a fox in the snow", "the snow in a dark night"]), model_writer=model, vocab_size=300,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def models(files: Path) -> list[str]:
    return ["--dit", f"{files}/dit.safetensors", "--vae", f"{files}/vae.safetensors", "--t5", f"{files}/t5.safetensors"]


def flags(files: Path, out: Path, *more: str) -> list[str]:
    """A picture of 32x48 in two steps, on the CPU."""
    size = ["--video_size", "32", "48", "--video_length", "1", "--infer_steps", "2"]
    return [*models(files), *size, "--device", "cpu", "--vae_dtype", "float32", "--save_path", str(out), *more]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def picture(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path))


def made(files: Path, out: Path, *more: str) -> np.ndarray:
    main(flags(files, out, "--prompt", "a fox", "--seed", "3", *more))
    return picture(out)


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory) -> np.ndarray:
    """The picture that flags without effect must not change."""
    return made(files, tmp_path_factory.mktemp("plain"), "--guidance_scale", "2")


def test_both_saves_the_latent_and_the_picture_under_musubis_names(files, tmp_path):
    made(files, tmp_path, "--output_type", "both", "--guidance_scale", "3", "--flow_shift", "12")
    picture_name, latent_name = names(tmp_path)
    assert re.fullmatch(STEM + r"_3_000\.png", picture_name)
    assert latent_name == picture_name.replace("_000.png", "_latent.safetensors")
    with safe_open(tmp_path / latent_name, "pt") as file:
        assert file.get_slice("latent").get_shape() == [16, 1, 4, 6]
        metadata = file.metadata()
    assert metadata.pop("negative_prompt") == DEFAULT_NEGATIVE_PROMPT
    assert metadata == {
        "seeds": "3", "prompt": "a fox", "height": "32", "width": "48", "video_length": "1", "infer_steps": "2",
        "guidance_scale": "3.0",
    }  # fmt: skip


def test_a_saved_latent_decodes_to_the_same_picture(files, tmp_path):
    first = made(files, tmp_path / "a", "--output_type", "both", "--no_metadata")
    (latent,) = (tmp_path / "a").glob("*_latent.safetensors")
    decode = [
        "--latent_path",
        str(latent),
        "--vae",
        f"{files}/vae.safetensors",
        "--vae_dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    main([*decode, "--save_path", str(tmp_path / "b")])
    assert np.array_equal(picture(tmp_path / "b"), first)
    assert re.fullmatch(STEM + rf"_0_{latent.stem}_000\.png", names(tmp_path / "b")[0])


HOSTILE_SEEDS = ["/../../x", "..\\..\\x", "CON", "a\x1b[2J", "[7]*", "9" * 5000, ""]


@pytest.mark.parametrize("seeds", HOSTILE_SEEDS, ids=lambda seeds: seeds[:9])
def test_a_seed_from_a_file_never_leads_out_of_the_folder(files, tmp_path, seeds):
    latent = tmp_path / f"{'l' * 230}.safetensors"
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, latent, {"seeds": seeds})
    decode = ["--latent_path", str(latent), "--vae", f"{files}/vae.safetensors", "--device", "cpu"]
    main([*decode, "--save_path", str(tmp_path / "a" / "b")])
    inside = list(tmp_path.rglob("*.png"))
    assert [path.parent for path in inside] == [tmp_path / "a" / "b"]
    assert re.fullmatch(STEM + r"_[\w.\[\]-]*_000\.png", inside[0].name)


def poisoned(source: Path, path: Path, name: str) -> Path:
    with safe_open(source, "pt") as file:
        save_file(load_file(source) | {name: torch.full_like(file.get_tensor(name), torch.nan)}, path, file.metadata())
    return path


def test_a_model_whose_output_is_not_finite_is_named_and_nothing_is_saved(files, tmp_path):
    bad = poisoned(files / "dit.safetensors", tmp_path / "bad.safetensors", "blocks.1.ffn.0.bias")
    with pytest.raises(InputError, match=rf"the output of {bad} in step 1 of 2 for 'a fox' contains NaN or infinity"):
        made(files, tmp_path / "out", "--dit", str(bad))
    both = ["--dit_high_noise", str(bad), "--timestep_boundary", "900"]
    with pytest.raises(InputError, match=rf"the output of {bad} in step 1 of 2"):
        made(files, tmp_path / "out", *both)
    assert not (tmp_path / "out").exists()


def test_a_vae_or_text_encoder_whose_output_is_not_finite_is_named(files, tmp_path):
    for flag, file, name in (("--vae", "vae", "conv2.bias"), ("--t5", "t5", "norm.weight")):
        bad = poisoned(files / f"{file}.safetensors", tmp_path / f"{file}.safetensors", name)
        more = ["--tokenizer", str(files / "spiece.model")]
        told = {"--vae": "the output of the VAE contains", "--t5": "the text encoder's output for 'a fox' contains"}
        with pytest.raises(InputError, match=told[flag]):
            made(files, tmp_path / "out", flag, str(bad), *more)
    assert not (tmp_path / "out").exists()


def test_a_seed_gives_the_picture_that_training_samples_show(files, tmp_path):
    prompt = SamplePrompt("a fox", "dark", width=48, height=32, seed=3, steps=2)
    sample = resolve_sample(prompt, TASKS["t2v-14B"], seed=0)
    texts = encode_samples(load_text_encoder(files / "t5.safetensors"), [sample])
    latent = sample_prompt(load_dit(files / "dit.safetensors"), sample, texts, "cpu")
    [video] = decode_latents(load_vae(files / "vae.safetensors"), [latent])
    wanted = to_frames(video)[0]
    assert np.array_equal(made(files, tmp_path, "--negative_prompt", "dark"), wanted)


@pytest.mark.parametrize("kind", ["prompt", "negative_prompt"])
def test_a_prompt_that_is_cut_is_said(files, tmp_path, kind):
    texts = {"prompt": "a fox", "negative_prompt": "", kind: "a fox " * 99}
    argv = flags(files, tmp_path, *(f"--{name}={text}" for name, text in texts.items()), "--infer_steps", "1")
    said = []
    generation.generate(parse_generate(argv), said.append)
    [line] = [line for line in said if "tokens" in line]
    assert line.startswith(f"the {kind.replace('_', ' ')} 'a fox")
    assert line.endswith("the text encoder reads the first 16")


def test_weights_that_do_not_fit_when_they_are_cast_are_refused_before_anything_is_encoded(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr("utils.swap.memory_checks.available_bytes", lambda: 1000)
    monkeypatch.setattr(generation, "load_text_encoder", None)
    with pytest.raises(InputError, match=r"^not enough RAM: .* from float32 to bfloat16.*; leave out --dit_dtype"):
        generation.generate(parse_generate(flags(files, tmp_path, "--prompt", "a fox", "--dit_dtype", "bf16")), print)


def test_a_picture_tells_prompt_and_settings_unless_metadata_is_left_out(files, tmp_path):
    made(files, tmp_path / "a", "--guidance_scale", "2")
    (path,) = (tmp_path / "a").glob("*.png")
    text = Image.open(path).text
    assert text["parameters"].startswith("a fox\nNegative prompt: 色调艳丽")
    assert text["parameters"].endswith("CFG scale: 2, Seed: 3, Size: 48x32, Frames: 1, Flow shift: 5, Model: dit")
    assert json.loads(text["wan_sample"])["solver"] == "unipc"
    made(files, tmp_path / "b", "--no_metadata")
    (path,) = (tmp_path / "b").glob("*.png")
    assert Image.open(path).text == {}


@pytest.mark.parametrize(("more", "scale"), [((), 6), (("--guidance_scale_high_noise", "7"), 7)])
def test_each_expert_may_suggest_a_guidance_of_its_own(files, tmp_path, more, scale):
    for name, guidance in (("dit", "2"), ("high", "6")):
        weights = load_file(files / f"{name}.safetensors")
        metadata = {"num_heads": "4", "text_len": "16", "sample_guidance_scale": guidance}
        save_file(weights, tmp_path / f"{name}.safetensors", metadata)
    experts = ["--task", "t2v-A14B", "--dit_high_noise", f"{tmp_path}/high.safetensors"]
    made(files, tmp_path, "--dit", f"{tmp_path}/dit.safetensors", *experts, *more)
    (path,) = tmp_path.glob("*.png")
    settings = json.loads(Image.open(path).text["wan_sample"])
    assert (settings["guidance_scale"], settings["guidance_scale_high_noise"]) == (2, scale)


def test_a_clip_is_saved_as_mp4_at_the_tasks_rate(files, tmp_path):
    main(flags(files, tmp_path, "--prompt", "a fox", "--video_length", "5"))
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(STEM + r"_\d+\.mp4", path.name)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (16, 48, 32)
        assert len(list(container.decode(stream))) == 5


def test_latent_images_saves_the_latent_and_every_frame(files, tmp_path):
    main(flags(files, tmp_path, "--prompt", "a fox", "--video_length", "5", "--output_type", "latent_images"))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert names(folder) == [f"{folder.name}_{i:03d}.png" for i in range(5)]
    assert (tmp_path / f"{folder.name}_latent.safetensors").is_file()


def test_the_latent_alone_needs_no_vae(files, tmp_path):
    without_vae = flags(files, tmp_path, "--prompt", "a fox", "--output_type", "latent")
    without_vae[without_vae.index("--vae") : without_vae.index("--t5")] = []
    main(without_vae)
    assert [name[-19:] for name in names(tmp_path)] == ["_latent.safetensors"]


def test_prompts_of_one_file_do_not_overwrite_each_other(files, tmp_path):
    lines = ["a fox", "# a comment", "the snow --h 48 --w 32", "the snow --s 1 --l 1 --f 5 --d 9"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    main(flags(files, tmp_path / "out", "--from_file", str(tmp_path / "prompts.txt"), "--seed", "3"))
    assert [re.sub(STEM, "", name) for name in names(tmp_path / "out")] == ["_3_000.png", "_3_000.png", "_9.mp4"]
    sizes = [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))]
    assert sizes == [(48, 32), (32, 48)]


def test_a_name_in_use_is_left_alone(files, tmp_path, monkeypatch):
    class Stopped(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5, 6999)

    monkeypatch.setattr("utils.generating.saving.datetime", Stopped)
    for _ in range(2):
        main(flags(files, tmp_path, "--prompt", "a fox", "--seed", "3", "--output_type", "latent"))
    wanted = [f"20260102-030405-{number}_3_latent.safetensors" for number in ("006", "007")]
    assert names(tmp_path) == wanted


def test_two_experts_with_the_same_weights_are_one_model(files, tmp_path, plain):
    both = ["--guidance_scale", "2", "--guidance_scale_high_noise", "2", "--timestep_boundary", "900"]
    same = made(files, tmp_path / "same", "--dit_high_noise", f"{files}/dit.safetensors", *both)
    other = made(files, tmp_path / "other", "--dit_high_noise", f"{files}/high.safetensors", *both)
    assert np.array_equal(plain, same) and not np.array_equal(plain, other)


def test_one_dit_of_a_two_expert_task_has_one_guidance_scale(files, tmp_path):
    defaults = ["--flow_shift", "12", "--guidance_scale", "3"]
    assert np.array_equal(made(files, tmp_path / "a", *defaults), made(files, tmp_path / "b", "--task", "t2v-A14B"))


@pytest.mark.parametrize(
    "swap",
    [
        "--blocks_to_swap 1",
        "--blocks_to_swap 3",
        "--blocks_to_swap 3 --block_swap_ring_size 1 --host_weights staged",
        "--weights_vram 200kB",
    ],
)
def test_swapped_blocks_change_nothing(files, tmp_path, plain, swap, capsys):
    assert np.array_equal(made(files, tmp_path, "--guidance_scale", "2", *swap.split()), plain)
    assert "3 blocks (" in capsys.readouterr().out


def test_flags_that_say_what_happens_anyway_change_nothing(files, tmp_path, plain):
    same = ["--cpu_noise", "--offload_inactive_dit", "--lazy_loading", "--force_v2_1_time_embedding"]
    assert np.array_equal(made(files, tmp_path, "--guidance_scale", "2", "--attn_mode", "sdpa", *same), plain)


def test_typed_prompts_go_on_after_a_mistake(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a fox --w 50\na fox --d 5\n\nthe snow\n"))
    main(flags(files, tmp_path, "--interactive"))
    assert [re.sub(STEM, "", name) for name in names(tmp_path)] == ["_5_000.png"]
    assert "error: line 1: width 50" in capsys.readouterr().out


def test_a_random_seed_is_printed_and_makes_the_picture_again(files, tmp_path, capsys):
    main(flags(files, tmp_path / "a", "--prompt", "a fox"))
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]
    main(flags(files, tmp_path / "b", "--prompt", "a fox", "--seed", seed))
    assert np.array_equal(picture(tmp_path / "a"), picture(tmp_path / "b"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--video_length", "4"], "--video_length 4 must be 4k.1, such as 1 or 5"),
        (["--video_size", "30", "48"], "height 30 must be a multiple of 16, such as 16 or 32"),
        (["--task", "s2v-14B"], "--task: s2v-14B is not one of t2v-1.3B, t2v-14B, .*ti2v-5B .did you mean"),
        (["--dit", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--vae", "nowhere.pth"], "--vae nowhere.pth does not exist"),
        (["--t5", "nowhere.pth"], "--t5 nowhere.pth does not exist"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--blocks_to_swap", "4"], "--blocks_to_swap 4: .* has 3 blocks"),
        (["--guidance_scale_high_noise", "4"], "give --dit_high_noise too"),
        (["--timestep_boundary", "0.9"], "give --dit_high_noise too"),
        (["--dit_high_noise", "x.safetensors"], "needs --timestep_boundary"),
        (["--attn_mode", "flash"], "flash is not supported: .*use torch or sdpa"),
        (["--device", "warp"], "warp is not a device"),
        (["--device", "cuda:99"], "cuda:99 does not exist"),
        (["--vae_dtype", "int3"], "int3 is not one of"),
        (["--lora_weight", "a.safetensors"], "--lora_weight a.safetensors does not exist"),
        (["--lora_multiplier", "2"], "--lora_multiplier has no effect without --lora_weight"),
        (["--lora_weight_high_noise", "a.safetensors"], "give --dit_high_noise too, or use --lora_weight"),
        (["--lycoris"], "--lycoris is not supported: only ordinary LoRAs"),
        (["--fp8_fast"], "--fp8_fast is not supported: .*--fp8 --fp8_scaled"),
        (["--fp8_scaled"], "--fp8_scaled has no effect without --fp8"),
        (["--interactive"], "not allowed with"),
        (["--vido_size", "32", "32"], "unknown flag --vido_size .did you mean --video_size"),
    ],
)
def test_a_wrong_flag_is_one_line_and_writes_nothing(files, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        main(flags(files, tmp_path / "out", "--prompt", "a fox", *more))
    assert not (tmp_path / "out").exists()


def test_a_dit_in_place_of_the_vae_is_refused_before_sampling(files, tmp_path):
    with pytest.raises(InputError, match=r"is not a Wan 2\.1 VAE"):
        main(flags(files, tmp_path / "out", "--prompt", "a fox", "--vae", f"{files}/dit.safetensors"))
    assert not (tmp_path / "out").exists()


def test_the_vae_of_wan_2_2_is_refused_before_sampling(files, tmp_path):
    save_file(oracle_weights("vae_wan22.safetensors"), tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=r"is the Wan 2\.2 VAE .*use the Wan 2\.1 VAE"):
        main(flags(files, tmp_path / "out", "--prompt", "a fox", "--vae", f"{tmp_path}/vae.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused(files, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="out is not a folder"):
        main(flags(files, tmp_path / "out" / "deeper", "--prompt", "a fox"))


@pytest.mark.parametrize("missing", ["--dit", "--vae", "--t5"])
def test_a_missing_model_is_named(files, tmp_path, missing):
    given = flags(files, tmp_path, "--prompt", "a fox")
    del given[given.index(missing) : given.index(missing) + 2]
    with pytest.raises(InputError, match=f"{missing} is missing"):
        main(given)


@pytest.fixture(scope="module")
def concept(files) -> str:
    """A slice of the low-noise DiT that changes the picture, and the checkpoint that holds it."""
    trained = attach_slice(load_dit(files / "dit.safetensors"), "0.2", 1)
    for parameter in trained.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    save_checkpoint(trained, files / "dit.safetensors", files / "taught.safetensors", concept="fox")
    save_slice(trained, files / "dit.safetensors", files / "fox.slice.safetensors", concept="fox")
    return str(files / "fox.slice.safetensors")


@pytest.mark.parametrize(("strength", "same"), [((), "taught"), (("--slice_strength", "0"), "dit")])
def test_slices_on_the_dit_show_what_the_checkpoint_shows(files, tmp_path, concept, strength, same):
    found = made(files, tmp_path / "a", "--slices", concept, *strength)
    assert np.array_equal(found, made(files, tmp_path / "b", "--dit", f"{files}/{same}.safetensors"))
    other = {"taught": "dit", "dit": "taught"}[same]
    assert not np.array_equal(found, made(files, tmp_path / "c", "--dit", f"{files}/{other}.safetensors"))


def test_a_slice_goes_to_the_expert_that_it_was_trained_on(files, tmp_path, concept):
    save_dit(files / "high_base.safetensors", seed=1)
    both = ["--dit_high_noise", f"{files}/high_base.safetensors", "--timestep_boundary", "900"]
    found = made(files, tmp_path / "a", "--slices", concept, *both)
    assert np.array_equal(found, made(files, tmp_path / "b", "--dit", f"{files}/taught.safetensors", *both))


def test_a_slice_of_another_model_is_refused_before_anything_is_encoded(files, tmp_path, concept):
    save_dit(files / "stranger.safetensors", seed=5)
    with pytest.raises(InputError, match="is not the base of"):
        made(files, tmp_path / "out", "--slices", concept, "--dit", f"{files}/stranger.safetensors")
    for more, told in ((["--slice_strength", "1"], "without --slices"),
                       (["--slices", concept, "--slice_strength", "inf"], "from -1,000 to 1,000"),
                       (["--slices", concept, "--slice_strength", "1", "2"], "one for each of the 1")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            made(files, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_slice_that_does_not_tell_its_base_is_used_with_a_note(files, tmp_path, concept, capsys):
    with safe_open(concept, "pt") as file:
        told = file.metadata()
    untold = [{**entry, "base": None, "start": None} for entry in json.loads(told["wan_slices"])]
    save_file(load_file(concept), tmp_path / "old.safetensors", {**told, "wan_slices": json.dumps(untold)})
    made(files, tmp_path / "out", "--slices", f"{tmp_path}/old.safetensors")
    assert f"note: {tmp_path}/old.safetensors does not record its base" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(device, chosen, tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(generation, "decode_latent_files", lambda config, say: [])
    config = SimpleNamespace(save_path=tmp_path, latent_paths=("latent",), device=torch.device(device))
    assert generation.generate(config, print) == [] and current == chosen


def test_only_a_job_that_begins_removes_what_a_killed_one_left(files, tmp_path):
    left = tmp_path / f"20260102-030405-006_7_000.png{LEFT}"
    left.touch()
    with pytest.raises(InputError, match=r"is not a Wan 2\.1 VAE"):
        main(flags(files, tmp_path, "--prompt", "a fox", "--vae", f"{files}/dit.safetensors"))
    assert left.exists()
    made(files, tmp_path)
    assert not left.exists()

"""Generation and training's samples on tiny models that start from pictures: what comes out, what is refused."""

import gc
import io
import json
import re
import weakref
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pictures import CONFIGS, SIZE, clip_of, tiny_model, vae_of, write_models, write_picture

from utils import generation
from utils.cli.generate import parse_generate
from utils.cli.unsupported import GENERATION
from utils.pixels.pictures import read_image
from utils.run.samples import SampleConfig, draw_samples, prepare_samples
from utils.sampling.defaults import NO_DEFAULTS
from utils.sampling.prompts import read_prompt_file
from utils.selective_finetune import attach_slice
from utils.slice_saving import save_checkpoint, save_slice
from wan.configs import TASKS
from wan.errors import InputError
from wan.loading import load_dit
from wan.vae import load_vae
from wan_generate_video import main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def there(files, monkeypatch):
    monkeypatch.chdir(files)


def flags(task: str, out: Path, *more: str, models: tuple[str, ...] = ("--vae", "--t5", "--clip")) -> list[str]:
    """Two steps of a clip of 5 frames, in the folder of the models."""
    named = {"--vae": vae_of(Path(), task), "--t5": Path("t5.safetensors"), "--clip": clip_of(Path(), task)}
    given = [word for flag in models if named[flag] for word in (flag, str(named[flag]))]
    size = ["--video_size", str(SIZE[1]), str(SIZE[0])] if "--video_size" not in more else []
    length = ["--video_length", "5"] if "--video_length" not in more else []
    numbers = ["--infer_steps", "2", "--guidance_scale", "1", "--seed", "3"]
    computing = ["--device", "cpu", "--vae_dtype", "float32"]
    start = ["--task", task, "--dit", f"{task}.safetensors", "--save_path", str(out)]
    return [*start, *given, *size, *length, *numbers, *computing, *more]


def pictures(task: str, first: str = "a.png", last: str = "b.png") -> list[str]:
    return ["--image_path", first, *(["--end_image_path", last] if task == "flf2v-14B" else [])]


def made(task: str, out: Path, *more: str) -> torch.Tensor:
    """The latent that is saved."""
    main(flags(task, out, "--prompt", "a red cat", "--output_type", "latent", *more))
    (path,) = out.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def refusal(task: str, tmp_path: Path, *more: str, **models) -> str:
    """The one line that is said before anything is loaded or written."""
    with pytest.raises(InputError) as error:
        parse_generate(flags(task, tmp_path / "out", *more, **models))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize("task", ["i2v-A14B", "i2v-14B", "ti2v-5B"])
def test_the_picture_changes_what_comes_out(tmp_path, task):
    (tmp_path / "copy.png").write_bytes(Path("a.png").read_bytes())
    first = made(task, tmp_path / "a", *pictures(task))
    assert torch.equal(first, made(task, tmp_path / "b", *pictures(task, f"{tmp_path}/copy.png")))
    assert not torch.allclose(first[:, 1:], made(task, tmp_path / "c", *pictures(task, "b.png"))[:, 1:], atol=1e-3)


def test_each_of_two_pictures_changes_what_comes_out(tmp_path):
    task = "flf2v-14B"
    both = made(task, tmp_path / "a", *pictures(task))
    assert not torch.allclose(both, made(task, tmp_path / "b", *pictures(task, last="a.png")), atol=1e-3)
    assert not torch.allclose(both, made(task, tmp_path / "c", *pictures(task, first="b.png")), atol=1e-3)


def test_the_first_latent_frame_of_ti2v_is_the_pictures_own(tmp_path):
    latent_CFHW = made("ti2v-5B", tmp_path / "a", "--image_path", "a.png")
    pixels = torch.tensor(read_image(Path("a.png"), SIZE).values).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    clean = load_vae("vae22.safetensors").encode(pixels)[0]
    assert torch.equal(latent_CFHW[:, :1], clean) and latent_CFHW.shape == (48, 2, 2, 4)
    assert not torch.allclose(made("ti2v-5B", tmp_path / "b")[:, :1], clean, atol=0.1)


@pytest.mark.parametrize(("task", "rate"), [("i2v-A14B", 16), ("ti2v-5B", 24)])
def test_a_video_names_its_picture_and_has_the_models_rate(tmp_path, task, rate):
    (tmp_path / "sub").mkdir()
    path = write_picture(tmp_path / "sub" / "my cat.png")
    main(flags(task, tmp_path / "out", "--prompt", "a red cat", "--image_path", str(path), "--output_type", "both"))
    (video,), (latent,) = (tmp_path / "out").glob("*.mp4"), (tmp_path / "out").glob("*.safetensors")
    with av.open(str(video)) as clip:
        assert clip.streams.video[0].average_rate == rate
        assert json.loads(clip.metadata["description"])["image_path"] == "my cat.png"
        assert "First frame: my cat.png" in clip.metadata["comment"] and "sub" not in str(clip.metadata)
    with safe_open(latent, "pt") as file:
        assert file.metadata()["image_path"] == "my cat.png"


def test_latents_of_48_channels_are_decoded_by_the_vae_that_they_are_of_whatever_the_task(tmp_path):
    save_file(
        {"latent": torch.randn(48, 2, 2, 4)}, tmp_path / "a.safetensors", {"prompt": "x", "image_path": "cat.png"}
    )
    save_file({"latent": torch.randn(16, 2, 2, 4)}, tmp_path / "b.safetensors")
    decode = ["--save_path", str(tmp_path / "out"), "--device", "cpu", "--vae_dtype", "float32"]
    main(["--latent_path", f"{tmp_path}/a.safetensors", "--vae", "vae22.safetensors", *decode])
    (video,) = (tmp_path / "out").glob("*.mp4")
    with av.open(str(video)) as clip:
        assert (clip.streams.video[0].average_rate, clip.streams.video[0].width) == (24, 64)
        assert "First frame: cat.png" in clip.metadata["comment"]
    with pytest.raises(InputError, match=r"is the Wan 2\.1 VAE .*; 48 are needed: use the Wan 2\.2 VAE"):
        main(["--latent_path", f"{tmp_path}/a.safetensors", "--vae", "vae.safetensors", *decode])
    both = [f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors"]
    with pytest.raises(InputError, match="latents of 16 and 48 channels, which are of different VAEs"):
        main(["--latent_path", *both, "--vae", "vae22.safetensors", *decode])


def test_the_size_follows_from_the_picture_and_is_said(tmp_path):
    write_picture(tmp_path / "wide.png", (96, 54))
    argv = [*flags("i2v-A14B", tmp_path, "--prompt", "a cat", "--image_path", f"{tmp_path}/wide.png")]
    del argv[argv.index("--video_size") : argv.index("--video_size") + 3]
    config, said = parse_generate(argv), []
    assert (config.prompts[0].width, config.prompts[0].height) == (None, None)
    with pytest.raises(InterruptedError), pytest.MonkeyPatch.context() as patched:
        patched.setattr(generation, "encode_starts", lambda samples, *_: stop(samples))
        generation.generate(config, said.append)
    line = f"832x464 follows from the shape of {tmp_path}/wide.png; give a width and a height for another size"
    assert line in said
    assert any(re.match(r"'a cat' from .*wide.png: 832x464, 5 frames, seed 3", line) for line in said)


def stop(samples):
    assert (samples[0].width, samples[0].height) == (832, 464)
    raise InterruptedError


def test_without_a_picture_and_a_size_a_clip_is_256x256(tmp_path):
    argv = flags("ti2v-5B", tmp_path, "--prompt", "a cat", "--infer_steps", "1", "--video_length", "1")
    del argv[argv.index("--video_size") : argv.index("--video_size") + 3]
    main(argv)
    (path,) = tmp_path.glob("*.png")
    assert Image.open(path).size == (256, 256)


TXT = "a red cat --i a.png --ei b.png\n"
TOML = '[prompt]\nimage_path = "a.png"\nend_image_path = "b.png"\n[[prompt.subset]]\nprompt = "a red cat"\n'
JSON = '[{"prompt": "a red cat", "image_path": "a.png", "end_image_path": "b.png"}]'


@pytest.mark.parametrize(("name", "text"), [("p.txt", TXT), ("p.toml", TOML), ("p.json", JSON)])
def test_prompt_files_name_pictures_as_the_flags_do(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    by_flags = parse_generate(flags("flf2v-14B", tmp_path, "--prompt", "a red cat", *pictures("flf2v-14B")))
    from_file = parse_generate(flags("flf2v-14B", tmp_path, "--from_file", f"{tmp_path}/{name}"))
    assert from_file.prompts == by_flags.prompts and by_flags.prompts[0].end_image_path == Path("b.png")


def test_a_prompt_files_picture_comes_before_that_of_the_flags(tmp_path):
    (tmp_path / "p.txt").write_text("a cat --f 5\na cat --i b.png --f 5\n")
    file = ["--from_file", f"{tmp_path}/p.txt", "--image_path", "a.png", "--video_length", "1"]
    config = parse_generate(flags("i2v-A14B", tmp_path, *file))
    assert [prompt.image_path.name for prompt in config.prompts] == ["a.png", "b.png"]
    (tmp_path / "p.json").write_text('[{"prompt": "a cat", "image_path": ""}]')
    assert read_prompt_file(tmp_path / "p.json", task=TASKS["ti2v-5B"])[0].image_path is None


def test_typed_prompts_start_from_pictures_and_go_on_after_a_mistake(tmp_path, monkeypatch, capsys):
    typed = "a cat\na cat --i nowhere.png\na cat --i b.png --d 5\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    main(flags("i2v-A14B", tmp_path, "--interactive", "--output_type", "latent"))
    assert [path.name[-21:] for path in tmp_path.iterdir()] == ["_5_latent.safetensors"[-21:]]
    told = capsys.readouterr().out
    assert "error: line 1: --task i2v-A14B needs a picture as the first frame: give its file with --i" in told
    assert "error: line 2: --i nowhere.png does not exist" in told


def test_a_typed_picture_without_a_vae_is_a_mistake_to_correct(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --i a.png\n\n"))
    main(flags("ti2v-5B", tmp_path, "--interactive", "--output_type", "latent", models=("--t5",)))
    assert "error: --vae is missing: it encodes the picture a.png" in capsys.readouterr().out


FIRST, LAST = ["--image_path", "a.png"], ["--end_image_path", "b.png"]


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("i2v-A14B", [], "flags: --task i2v-A14B needs a picture as the first frame: give its file with --image_path"),
        ("flf2v-14B", FIRST, "needs a picture as the last frame: give its file with --end_image_path"),
        (
            "i2v-14B",
            FIRST + LAST,
            "i2v-14B takes no picture as the last frame: leave --end_image_path out; it is for flf2v-14B$",
        ),
        ("ti2v-5B", LAST, "ti2v-5B takes no picture as the last frame: leave --end_image_path out"),
        (
            "t2v-14B",
            FIRST,
            "takes no picture as the first .* --image_path out; it is for i2v-14B, i2v-A14B, flf2v-14B, ti2v-5B",
        ),
        ("ti2v-5B", ["--image_path", "nowhere.png"], "flags: --image_path nowhere.png does not exist"),
        ("ti2v-5B", ["--image_path", "prompts.txt"], "prompts.txt cannot be read"),
        ("ti2v-5B", [*FIRST, "--video_length", "1"], "a single frame would be the picture .*ask for 5 frames or more"),
        ("ti2v-5B", ["--video_size", "48", "64"], "height 48 must be a multiple of 32, such as 32 or 64"),
        ("i2v-A14B", [*FIRST, "--clip", "clip.safetensors"], "--clip has no effect: --task i2v-A14B does not read"),
        ("t2v-14B", ["--clip", "clip.safetensors"], "--clip has no effect: --task t2v-14B does not read"),
        ("i2v-14B", [*FIRST, "--clip", "nowhere.pth"], "--clip nowhere.pth does not exist"),
        ("t2v-14B", ["--control_image_path", "a.png"], "one-frame inference is not supported; .* is --image_path"),
        ("t2v-14B", ["--trim_tail_frames", "3"], "an end picture is the last frame and adds none; --video_length"),
    ],
)
def test_pictures_that_the_task_cannot_start_from_are_refused(tmp_path, task, more, message):
    assert re.search(message, refusal(task, tmp_path, "--prompt", "a cat", *more))


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_a_missing_image_encoder_is_named_with_its_files(tmp_path, task):
    told = refusal(task, tmp_path, "--prompt", "a cat", *pictures(task), models=("--vae", "--t5"))
    assert told.startswith(
        f"--clip is missing: --task {task} reads its pictures through CLIP too; give the file models_"
    )


def test_a_missing_vae_is_named_where_a_picture_is_encoded(tmp_path):
    latent = ["--prompt", "a cat", *FIRST, "--output_type", "latent"]
    assert "--vae is missing" in refusal("i2v-A14B", tmp_path, *latent, models=("--t5",))
    assert "--vae is missing: it encodes the picture a.png" in refusal("ti2v-5B", tmp_path, *latent, models=("--t5",))


def test_pictures_have_no_effect_on_saved_latents(tmp_path):
    decode = ["--latent_path", "a.png", "--vae", "vae.safetensors", "--save_path", str(tmp_path)]
    for more in (FIRST, LAST, ["--clip", "clip.safetensors"]):
        with pytest.raises(InputError, match=f"{more[0]} has no effect on --latent_path"):
            parse_generate([*decode, *more])


@pytest.mark.parametrize("line", ["a cat --i nowhere.png", "a cat --f 5", "a cat --i a.png --ei b.png --f 5"])
def test_a_wrong_picture_in_a_prompt_file_is_named_with_its_line(tmp_path, line):
    (tmp_path / "p.txt").write_text(f"# first\n{line}\n")
    for read in (lambda path: read_prompt_file(path, task=TASKS["i2v-A14B"]),
                 lambda path: parse_generate(flags("i2v-A14B", tmp_path, "--from_file", str(path)))):  # fmt: skip
        with pytest.raises(InputError, match=r"p.txt line 2: .*--e?i\b"):
            read(tmp_path / "p.txt")


def test_no_refused_flag_of_generation_says_that_pictures_are_not_supported():
    assert not {"--image_path", "--end_image_path", "--clip"} & GENERATION.keys()
    known = set(re.findall(r"--[a-z0-9_]+", " ".join(GENERATION.values())))
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patched:
        shown = io.StringIO()
        patched.setattr("sys.stdout", shown)
        parse_generate(["--help"])
    assert {flag for flag in known if flag not in shown.getvalue()} == set()


def test_two_experts_start_from_the_same_picture(tmp_path):
    save_file(
        tiny_model("i2v-A14B", seed=1).state_dict(), tmp_path / "high.safetensors", {"num_heads": "4", "text_len": "8"}
    )
    both = ["--dit_high_noise", f"{tmp_path}/high.safetensors", "--guidance_scale_high_noise", "1"]
    found = {first: made("i2v-A14B", tmp_path / first, "--image_path", first, *both) for first in ("a.png", "b.png")}
    assert not torch.allclose(found["a.png"], found["b.png"], atol=1e-3)
    assert not torch.equal(found["a.png"], made("i2v-A14B", tmp_path / "one", "--image_path", "a.png"))


@pytest.mark.parametrize("task", ["i2v-14B", "ti2v-5B"])
def test_slices_on_models_that_start_from_pictures_show_what_the_checkpoint_shows(tmp_path, task):
    base = Path(f"{task}.safetensors")
    trained = attach_slice(load_dit(base), "0.2", 1)
    for parameter in trained.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    trained.write_back()
    save_checkpoint(trained, base, tmp_path / "taught.safetensors", concept="fox")
    save_slice(trained, base, tmp_path / "fox.safetensors", concept="fox")
    sliced = made(task, tmp_path / "a", *FIRST, "--slices", f"{tmp_path}/fox.safetensors")
    assert torch.equal(sliced, made(task, tmp_path / "b", *FIRST, "--dit", f"{tmp_path}/taught.safetensors"))
    assert not torch.equal(sliced, made(task, tmp_path / "c", *FIRST))


def test_the_image_encoder_is_gone_and_the_vae_back_on_the_host_before_other_models_come(tmp_path, monkeypatch):
    from utils.sampling import starts

    load_clip, load_text, encoders, vaes = starts.load_image_encoder, generation.load_text_encoder, [], []
    monkeypatch.setattr("wan.vae.WanVAE.to", lambda vae, device: vaes.append(str(device)) or vae)

    def clip(*args, **kwargs):
        encoders.append(weakref.ref(encoder := load_clip(*args, **kwargs)))
        return encoder

    def text(*args, **kwargs):
        gc.collect()
        assert encoders[0]() is None and vaes[-1] == "cpu" and len(vaes) == 2
        return load_text(*args, **kwargs)

    monkeypatch.setattr(starts, "load_image_encoder", clip)
    monkeypatch.setattr(generation, "load_text_encoder", text)
    made("i2v-14B", tmp_path, *FIRST)
    assert len(encoders) == 1


@pytest.mark.parametrize("task", [pytest.param("flf2v-14B", marks=pytest.mark.slow), "ti2v-5B"])
def test_training_draws_the_clip_that_generation_makes(tmp_path, task):
    last = " --ei b.png" if task == "flf2v-14B" else ""
    (tmp_path / "p.txt").write_text(f"a red cat --i a.png{last} --w 64 --h 32 --f 5 --s 2 --g 1 --d 3\n")
    prompts = tuple(read_prompt_file(tmp_path / "p.txt", task=TASKS[task]))
    where = {"vae": vae_of(Path(), task), "t5": Path("t5.safetensors"), "clip": clip_of(Path(), task)}
    config = SampleConfig(prompts, tokenizer=None, vae_dtype=torch.float32, **where)
    prepared = prepare_samples(config, TASKS[task], CONFIGS[task], 0, torch.device("cpu"), NO_DEFAULTS, print)
    drawn = draw_samples(prepared, load_dit(f"{task}.safetensors"), torch.device("cpu"), tmp_path / "s", "x", None)
    main(flags(task, tmp_path / "g", "--prompt", "a red cat", *pictures(task), "--no_metadata"))
    (video,) = (tmp_path / "g").glob("*.mp4")
    assert drawn[0].path.read_bytes() == video.read_bytes()


def test_training_samples_without_an_image_encoder_are_refused_before_a_model_loads(tmp_path):
    (tmp_path / "p.txt").write_text("a red cat --i a.png --f 5\n")
    prompts = tuple(read_prompt_file(tmp_path / "p.txt", task=TASKS["i2v-14B"]))
    config = SampleConfig(prompts, Path("nowhere"), Path("nowhere"), None, torch.float32)
    with pytest.raises(InputError, match="--clip is missing"):
        prepare_samples(config, TASKS["i2v-14B"], CONFIGS["i2v-14B"], 0, torch.device("cpu"), NO_DEFAULTS, print)

"""Samples that start from pictures: the latents of diffusers' pipeline, the sizes of Wan's own code."""

from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from one_sample import sample_prompt
from PIL import Image
from test_picture_models import diffusers_model
from test_sampling import WansOwnSigmas
from tiny_pictures import CONFIGS, PICTURE_TASKS, SIZE, clip_of, tiny_model, vae_of, write_models, write_picture

from utils.pixels.pictures import read_image
from utils.sampling.denoising import Denoising, initial_noise, resolve_sample, size_line
from utils.sampling.picture_rules import sample_size, size_like
from utils.sampling.prompts import SamplePrompt
from utils.sampling.starts import encode_starts
from wan.configs import TASKS
from wan.errors import InputError
from wan.image_encoder import load_image_encoder
from wan.vae import load_vae

TEXT_LEN = 512  # by which diffusers tells the tokens of texts from those of pictures
TEXTS = {
    "a fox": torch.randn(5, 48, generator=torch.Generator().manual_seed(1)),
    "dark": torch.randn(3, 48, generator=torch.Generator().manual_seed(2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def sample_of(task: str, *pictures: Path, steps: int = 3):
    paths = dict(zip(("image_path", "end_image_path"), pictures, strict=False))
    prompt = SamplePrompt("a fox", "dark", *SIZE, frames=5, seed=3, steps=steps, guidance_scale=3.0, **paths)
    return resolve_sample(prompt, TASKS[task], seed=0)


def pictures_of(folder: Path, task: str) -> list[Path]:
    return [folder / "a.png", folder / "b.png"][: 2 if task == "flf2v-14B" else 1]


def start_of(folder, task, sample):
    vae = load_vae(vae_of(folder, task))
    (start,) = encode_starts([sample], TASKS[task], vae, clip_of(folder, task), CONFIGS[task].image_dim, "cpu", print)
    return start


def pixels(path: Path) -> torch.Tensor:
    return torch.tensor(read_image(path, SIZE).values).permute(2, 0, 1)[None].float() / 255


def pipeline_latents(folder, task, sample) -> torch.Tensor:
    first, *last = [pixels(path) for path in pictures_of(folder, task)]
    vae, clip, embeds = load_vae(vae_of(folder, task)), clip_of(folder, task), None
    vae.model.register_to_config(latents_mean=list(vae.kind.mean), latents_std=list(vae.kind.std))
    if clip:
        embeds = torch.cat([load_image_encoder(clip).encode(one * 2 - 1) for one in (first, *last)])
    pipeline = WanImageToVideoPipeline(
        None, None, vae.model, WansOwnSigmas(prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=sample.flow_shift), transformer=diffusers_model(tiny_model(task)),
        expand_timesteps=task == "ti2v-5B",
    )  # fmt: skip
    pipeline.encode_image = lambda *_: embeds  # which it would otherwise prepare by CLIP's own rule
    pipeline.set_progress_bar_config(disable=True)
    padded = {
        text: torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LEN - len(rows)))[None] for text, rows in TEXTS.items()
    }
    return pipeline(
        first, width=sample.width, height=sample.height, num_frames=sample.frames, num_inference_steps=sample.steps,
        guidance_scale=sample.guidance_scale, output_type="latent", latents=initial_noise(sample)[None],
        last_image=last[0] if last else None, prompt_embeds=padded["a fox"],
        negative_prompt_embeds=padded["dark"],
    ).frames[0]  # fmt: skip


@pytest.mark.parametrize("task", PICTURE_TASKS)
def test_a_sample_that_starts_from_pictures_has_the_latents_of_diffusers_pipeline(folder, task):
    sample = sample_of(task, *pictures_of(folder, task))
    model = tiny_model(task)
    model.text_len = TEXT_LEN
    ours = sample_prompt(model, sample, TEXTS, "cpu", start=start_of(folder, task, sample))
    torch.testing.assert_close(ours, pipeline_latents(folder, task, sample), atol=1e-5, rtol=1e-5)


def in_full(t):
    """The timestep of each token, [B, L]."""
    return t.values_U[t.numbers_BL]


def test_the_clean_first_frame_is_what_the_model_sees_before_every_step_at_timestep_0(folder):
    sample, model, seen = sample_of("ti2v-5B", folder / "a.png"), tiny_model("ti2v-5B"), []
    start = start_of(folder, "ti2v-5B", sample)
    model.register_forward_pre_hook(lambda _, args: seen.append((args[0][:, :, :1], in_full(args[1]))))
    latent_CFHW = sample_prompt(model, sample, TEXTS, "cpu", start=start)
    assert torch.equal(latent_CFHW[:, :1], start.clean_BCFHW[0])
    assert len(seen) == 2 * sample.steps and all(torch.equal(first, start.clean_BCFHW) for first, _ in seen)
    of_tokens = [times for _, times in seen]
    assert all((t[0, :2] == 0).all() and (t[0, 2:] > 0).all() and t.shape == (1, 4) for t in of_tokens)


def test_without_a_picture_ti2v_makes_a_video_of_noise_alone(folder):
    sample, seen, model = sample_of("ti2v-5B"), [], tiny_model("ti2v-5B")
    start = start_of(folder, "ti2v-5B", sample)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape))
    sample_prompt(model, sample, TEXTS, "cpu", start=start)
    assert set(seen) == {(1,)} and torch.equal(Denoising(sample, start).latent_CFHW, initial_noise(sample))


def test_samples_with_the_same_pictures_share_what_is_encoded_of_them(folder, monkeypatch):
    task, encoded, patched = "flf2v-14B", [], "utils.sampling.starts.picture_condition"
    samples = [sample_of(task, folder / f"{a}.png", folder / f"{b}.png") for a, b in ("ab", "ab", "ba")]
    monkeypatch.setattr(patched, lambda vae, own, frames: encoded.append(own) or own[0])
    vae, clip = load_vae(vae_of(folder, task)), clip_of(folder, task)
    starts = encode_starts(samples, TASKS[task], vae, clip, 24, "cpu", print)
    assert len(encoded) == 2 and starts[0] is starts[1] is not starts[2]
    assert torch.equal(starts[0].given.clip_BPI, torch.cat(starts[2].given.clip_BPI.chunk(2, 1)[::-1], 1))


def test_a_picture_of_another_shape_covers_the_size_and_is_cropped_for_y_and_clip_alike(folder, tmp_path):
    path, task = write_picture(tmp_path / "large.png", (200, 50)), "i2v-14B"
    whole, cropped = sample_of(task, path), tmp_path / "cropped.png"
    Image.fromarray(read_image(path, SIZE).values).save(cropped)
    one, other = start_of(folder, task, whole).given, start_of(folder, task, sample_of(task, cropped)).given
    assert torch.equal(one.y_BCFHW, other.y_BCFHW) and torch.equal(one.clip_BPI, other.clip_BPI)


def test_an_image_encoder_of_another_width_is_refused(folder):
    sample = sample_of("i2v-14B", folder / "a.png")
    vae, clip = load_vae(folder / "vae.safetensors"), folder / "clip.safetensors"
    with pytest.raises(InputError, match=r"makes 257 tokens of width 24 .* the model reads 257 of width 1280"):
        encode_starts([sample], TASKS["i2v-14B"], vae, clip, 1280, "cpu", print)


@pytest.mark.parametrize(
    ("task", "picture", "size"),
    [
        ("i2v-A14B", (1280, 720), (832, 464)),
        ("i2v-14B", (1024, 1024), (624, 624)),
        ("flf2v-14B", (480, 832), (480, 832)),
        ("ti2v-5B", (1280, 720), (1248, 704)),
        ("ti2v-5B", (1024, 1024), (960, 928)),
        ("ti2v-5B", (1280, 704), (1280, 704)),
    ],
)
def test_the_size_that_follows_from_a_picture_is_wans_own(task, picture, size):
    assert size_like(TASKS[task], picture) == size


def test_a_side_that_is_left_out_follows_from_the_picture_and_the_other_side(tmp_path):
    path = write_picture(tmp_path / "a.png", (300, 100))
    assert sample_size(TASKS["i2v-A14B"], 480, None, path) == (480, 160)
    assert sample_size(TASKS["ti2v-5B"], None, 64, path) == (192, 64)
    assert sample_size(TASKS["i2v-A14B"], 480, 320, path) == (480, 320)
    assert sample_size(TASKS["t2v-14B"], None, 64, None) == (256, 64)


def test_a_picture_that_no_size_follows_from_asks_for_one(tmp_path):
    for size in ((3000, 1), (1, 3000)):
        path = write_picture(tmp_path / "a.png", size)
        for task in ("i2v-A14B", "ti2v-5B"):
            with pytest.raises(InputError, match="too long for a video of its shape: give a width and a height"):
                sample_size(TASKS[task], None, None, path)


def test_a_size_that_follows_is_said_and_has_the_shift_of_480p(tmp_path):
    path = write_picture(tmp_path / "a.png", (128, 72))
    prompt = SamplePrompt("a fox", image_path=path, frames=5)
    samples = {name: resolve_sample(prompt, TASKS[name], 0) for name in PICTURE_TASKS}
    assert {name: sample.flow_shift for name, sample in samples.items()} == {
        "i2v-A14B": 5, "i2v-14B": 3, "flf2v-14B": 16, "ti2v-5B": 5,
    }  # fmt: skip
    line = f"832x464 follows from the shape of {path}; give a width and a height for another size"
    assert size_line(prompt, samples["i2v-14B"]) == line
    sized = SamplePrompt("a fox", width=832, height=464, image_path=path, frames=5)
    assert resolve_sample(sized, TASKS["i2v-14B"], 0).flow_shift == 5 and size_line(sized, samples["i2v-14B"]) is None


def test_a_picture_is_read_as_viewers_show_it_and_what_was_done_is_said_once(folder, tmp_path):
    path, said, task = tmp_path / "a.png", [], "ti2v-5B"
    turned = Image.Exif()
    turned[274] = 6  # the orientation of a camera that was held upright
    Image.new("RGBA", (32, 64), (255, 0, 0, 0)).save(path, exif=turned)
    assert sample_size(TASKS[task], None, 32, path) == (64, 32)
    samples = [sample_of(task, path), sample_of(task, path)]
    starts = encode_starts(samples, TASKS[task], load_vae(vae_of(folder, task)), None, None, "cpu", said.append)
    white = load_vae(vae_of(folder, task)).encode(torch.ones(1, 3, 1, *SIZE[::-1]))
    assert all(torch.equal(start.clean_BCFHW, white) for start in starts)
    assert said == [f"{path} is transparent: it is read as if on white"]

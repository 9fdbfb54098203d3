"""Teaches the tiny Wan two new characters and then a clip, each in its own slice, with the project's own scripts.

    python examples/two_characters.py [OUTPUT_FOLDER]

Writes two_characters.png (a row for each checkpoint, a column for each prompt), table.md and clip.mp4.
"""

import argparse
import importlib
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY_WAN = ROOT / "examples" / "tiny_wan"
sys.path[:0] = [str(ROOT), str(TINY_WAN)]

import av  # noqa: E402
import torch  # noqa: E402
from atlas import read_atlas, read_picture  # noqa: E402
from emoji_pictures import moving, nearest, psnr  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from safetensors import safe_open  # noqa: E402

from utils.sampling.writers import save_image, save_video  # noqa: E402
from utils.selective_finetune import slice_indices  # noqa: E402

CHARACTERS = {"character1": "owl", "character2": "nesting dolls"}
OLD = ("tiger", "rocket", "hot beverage", "cactus")
CLIP_PROMPT = "character1 moving left"
BASE = TINY_WAN / "tiny_wan_t2v.safetensors"
VAE = TINY_WAN / "tiny_wan_vae.safetensors"
T5 = TINY_WAN / "models_t5_tiny.safetensors"
FF = "0.2"
STEPS = 200
SHIFTS = ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2), (1, 1), (-1, -1), (1, -1), (-1, 1))  # pixels down, right
LEARNING_RATE = "2e-3"
SEEDS = 8
SAMPLING = ["--infer_steps", "20", "--flow_shift", "3", "--guidance_scale", "1", "--seed", "1"]


@dataclass(frozen=True)
class Stage:
    """A checkpoint and the pictures that it drew for every prompt, [seeds, 3, 64, 64] each."""

    name: str
    checkpoint: Path
    drawn: dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "out" / "two_characters"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help=f"for all results (default: {default})")
    folder = parser.parse_args().folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty: choose another folder or delete it")
    started = time.monotonic()
    stages = [_draw_all("base", BASE, folder)]
    for number, name in enumerate(CHARACTERS, 1):
        dataset = _write_pictures(name, folder)
        checkpoint = _train(name, number, stages[-1].checkpoint, dataset, folder)
        stages.append(_draw_all(f"after {name}", checkpoint, folder))
    _draw_picture(stages, folder / "two_characters.png")
    table = _recognition_table(stages) + _bytes_lines(stages) + _clip_lines(stages[-1].checkpoint, folder)
    table.append(f"Total time: {(time.monotonic() - started) / 60:.1f} minutes.")
    (folder / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n" + "\n".join(table))
    print(f"\nsaved {folder / 'two_characters.png'}, {folder / 'table.md'} and {folder / 'clip.mp4'}")


def _run(script: str, *flags: object, launcher: tuple[str, ...] = ()) -> None:
    """Prints the command that a user would type to run one of the scripts, and runs it.

    Without a launcher in this process, since importing the libraries anew would take longer than the work.
    """
    arguments = [str(ROOT / script), *map(str, flags)]
    print(f"\n$ {'accelerate launch' if launcher else 'python'} {shlex.join([*launcher[2:], *arguments])}", flush=True)
    if launcher:
        subprocess.run([sys.executable, *launcher, *arguments], check=True)
    else:
        importlib.import_module(script.removesuffix(".py")).main(arguments[1:])


def _write_pictures(name: str, folder: Path) -> Path:
    """Writes a character's captioned pictures; returns the path of their dataset toml."""
    data = folder / "data" / name
    picture = read_picture(TINY_WAN / "held_out" / f"{CHARACTERS[name].replace(' ', '_')}.png")
    for number, shift in enumerate(SHIFTS):
        moved = picture.roll(shift, dims=(-2, -1))  # the margins are white, so nothing wraps around
        _write_captioned(data / f"{name}_{number}.png", moved, name)
    return _write_dataset(folder, name, f"image_directory = '{data.as_posix()}'\nnum_repeats = 16")


def _write_captioned(path: Path, picture_CHW: torch.Tensor, caption: str) -> None:
    save_image(path, picture_CHW)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def _write_clip(folder: Path) -> tuple[Path, torch.Tensor]:
    """Writes a captioned clip of the first character moving; returns its dataset toml and its frames [3, 5, 64, 64]."""
    picture = read_picture(TINY_WAN / "held_out" / f"{CHARACTERS['character1'].replace(' ', '_')}.png")
    clip_3THW = moving(picture[None], ["moving left"], 5)[0]
    data = folder / "data" / "clip"
    save_video(data / "0.mp4", clip_3THW, fps=16)
    (data / "0.txt").write_text(CLIP_PROMPT, encoding="utf-8")
    return _write_dataset(
        folder, "clip", f"video_directory = '{data.as_posix()}'\ntarget_frames = [5]\nnum_repeats = 16"
    ), clip_3THW


def _write_dataset(folder: Path, name: str, source: str) -> Path:
    path = folder / "data" / f"{name}.toml"
    general = '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nbatch_size = 8\n'
    cache = f"cache_directory = '{(folder / 'cache' / name).as_posix()}'\n"
    path.write_text(f"{general}\n[[datasets]]\n{source}\n{cache}", encoding="utf-8")
    return path


def _train(name: str, ffid: int, dit: Path, dataset: Path, folder: Path) -> Path:
    """Caches the dataset and trains slice `ffid` of `dit` on it; returns the new checkpoint's path.

    What the base knows is preserved, without a list of prompts, and so are the concepts that `dit` already holds: the
    reference predictions that the runs before recorded are used again, and only those of the newest concept are new.
    """
    _run("wan_cache_latents.py", "--dataset_config", dataset, "--vae", VAE)
    _run("wan_cache_text_encoder_outputs.py", "--dataset_config", dataset, "--t5", T5, "--batch_size", 16)
    flags = [
        *("--task", "t2v-14B", "--dit", dit, "--dataset_config", dataset, "--sdpa", "--mixed_precision", "no"),
        *("--optimizer_type", "adamW", "--learning_rate", LEARNING_RATE, "--lr_scheduler", "cosine"),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", "--max_train_steps", STEPS, "--seed", 1234),
        *("--max_data_loader_n_workers", 0, "--output_dir", folder / "saves", "--output_name", name),
        *("--ff", FF, "--ffid", ffid, "--t5", T5, "--preserve_prompts"),
        *(["--preserve_answers", dit.with_suffix(".answers.safetensors")] if ffid > 1 else []),
    ]
    threads = str(torch.get_num_threads())
    launcher = ("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", threads, "--num_processes", "1")
    launcher += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    _run("wan_train_network.py", *flags, launcher=launcher)
    return folder / "saves" / f"{name}.safetensors"


def _draw_all(name: str, checkpoint: Path, folder: Path) -> Stage:
    """Draws every prompt with every seed, in one run of the generation script."""
    prompts = (*CHARACTERS, *OLD)
    lines = [f"{prompt} --d {seed}" for prompt in prompts for seed in range(SEEDS)]
    drawn = _generate(lines, checkpoint, folder / "samples" / name.replace(" ", "_"), "images", 1)
    pictures = torch.stack([read_picture(path) for path in drawn]).unflatten(0, (len(prompts), SEEDS))
    return Stage(name, checkpoint, dict(zip(prompts, pictures, strict=True)))


def _generate(lines: list[str], checkpoint: Path, folder: Path, output_type: str, frames: int) -> list[Path]:
    """The files that wan_generate_video.py writes, in the order of the lines (their names begin with the time)."""
    folder.mkdir(parents=True)
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run(
        *("wan_generate_video.py", "--task", "t2v-14B", "--dit", checkpoint, "--vae", VAE, "--t5", T5),
        *("--from_file", prompts, "--save_path", folder, "--output_type", output_type, "--video_size", 64, 64),
        *("--video_length", frames, "--dit_dtype", "fp32", "--vae_dtype", "fp32", *SAMPLING),
    )
    return sorted(folder.iterdir())


def _recognition_table(stages: list[Stage]) -> list[str]:
    """For every prompt the share of samples whose nearest picture, among all in the atlas, is the prompted one."""
    names, pictures = read_atlas(TINY_WAN)
    lines = [
        f"Share of samples whose nearest picture, among all {len(names)}, is the prompted one ({SEEDS} seeds):",
        "",
        f"| prompt | its picture | {' | '.join(stage.name for stage in stages)} |",
        f"|---|---|{'---|' * len(stages)}",
    ]
    for prompt in stages[0].drawn:
        row = names.index(CHARACTERS.get(prompt, prompt))
        rates = [(nearest(stage.drawn[prompt], pictures) == row).float().mean().item() for stage in stages]
        lines.append(f"| {prompt} | {names[row]} | {' | '.join(f'{rate:.0%}' for rate in rates)} |")
    return [*lines, ""]


def _bytes_lines(stages: list[Stage]) -> list[str]:
    lines = [
        "| checkpoint, compared with the one before | bytes changed in its slice | bytes changed outside |",
        "|---|---|---|",
    ]
    for ffid, (before, after) in enumerate(pairwise(stages), 1):
        inside, outside = _changed_bytes(before.checkpoint, after.checkpoint, ffid)
        lines.append(f"| {after.name}, ff {FF}, ffid {ffid} | {inside:,} | {outside:,} |")
    return [*lines, ""]


def _changed_bytes(before: Path, after: Path, ffid: int) -> tuple[int, int]:
    """How many bytes differ between two checkpoints: (within slice `ffid`, everywhere else)."""
    inside = outside = 0
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        assert sorted(old.keys()) == sorted(new.keys())
        for name in old.keys():  # noqa: SIM118 (a file, not a dict)
            a, b = old.get_tensor(name).flatten(), new.get_tensor(name).flatten()
            changed = (a.view(torch.uint8) != b.view(torch.uint8)).unflatten(0, (-1, a.element_size())).sum(1)
            shape = old.get_slice(name).get_shape()
            if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
                chosen = slice_indices(name, shape, FF, ffid)
                inside += int(changed[chosen].sum())
                changed[chosen] = 0
            outside += int(changed.sum())
    return inside, outside


def _clip_lines(checkpoint: Path, folder: Path) -> list[str]:
    """Trains the next slice on a clip; how close the generated clip comes to it, before and after."""
    dataset, clip_3THW = _write_clip(folder)
    after = _train("clip", len(CHARACTERS) + 1, checkpoint, dataset, folder)
    rates = []
    for name, dit in (("before", checkpoint), ("after", after)):
        (path,) = _generate([CLIP_PROMPT], dit, folder / "samples" / f"clip_{name}", "video", 5)
        rates.append(psnr(_read_video(path)[None], clip_3THW[None]))
    path.replace(folder / "clip.mp4")
    psnr_text = f"{rates[0]:.1f} dB before training, {rates[1]:.1f} dB after"
    return [f"'{CLIP_PROMPT}' (5 frames), PSNR against the training clip: {psnr_text}.", ""]


def _read_video(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(3, 0, 1, 2) / 127.5 - 1


def _draw_picture(stages: list[Stage], path: Path) -> None:
    """Draws one sample (the first seed) of every prompt and stage, at twice its size."""
    cell, left, top = 128, 150, 50
    prompts = list(stages[0].drawn)
    sheet = Image.new("RGB", (left + cell * len(prompts), top + cell * len(stages)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, prompt in enumerate(prompts):
        title = f"{prompt}\n(new: {CHARACTERS[prompt]})" if prompt in CHARACTERS else f"{prompt}\n(already known)"
        draw.multiline_text(
            (left + cell * column + cell // 2, top // 2), title, "black", font, anchor="mm", align="center", spacing=4
        )
    for row, stage in enumerate(stages):
        label = f"{stage.name}\n(ffid {row})" if row else "base model"
        draw.multiline_text((10, top + cell * row + cell // 2), label, "black", font, anchor="lm", spacing=6)
        for column, prompt in enumerate(prompts):
            levels = ((stage.drawn[prompt][0] + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
            picture = Image.fromarray(levels.numpy()).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + cell * column, top + cell * row))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()

"""What a generation writes: latents, pictures and videos, and those that saved latents hold.

Shapes: C latent channels, F H W latent frames, height, width, T frames.
"""

import glob
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from torch import Tensor

from utils.files import file_name
from utils.generating.config import GenerateConfig
from utils.generating.experts import Expert
from utils.sampling import writers
from utils.sampling.batches import decode_latents
from utils.sampling.denoising import Denoising, Sample
from utils.sampling.sample_metadata import picture_names, sample_settings, settings_of_latent
from wan.errors import InputError
from wan.vae import WanVAE, load_vae

_LATENT_OUTPUTS = ("latent", "both", "latent_images")
_FRAME_OUTPUTS = ("images", "latent_images")


def save_all(
    config: GenerateConfig,
    denoisings: Sequence[Denoising],
    experts: Sequence[Expert],
    vae: WanVAE | None,
    say: Callable[[str], None],
) -> list[Path]:
    """Saves each sample as the job asks, and says so; the VAE decodes on the job's device."""
    stems = _free_stems(config.save_path, [denoising.sample.seed for denoising in denoisings])
    paths = []
    if config.output_type in _LATENT_OUTPUTS:
        # All before the first is decoded: hours of sampling are safe if the decoder runs out of memory.
        for stem, denoising in zip(stems, denoisings, strict=True):
            metadata = _latent_metadata(denoising.sample) if config.write_metadata else {}
            path = config.save_path / f"{stem}_latent.safetensors"
            paths.append(writers.save_latent(path, denoising.latent_CFHW, metadata))
    if config.output_type != "latent":
        vae.to(config.device)
        videos = decode_latents(vae, [denoising.latent_CFHW for denoising in denoisings])
        paths += [
            _save_video(config, vae, video_3THW, stem, _settings(denoising.sample, experts))
            for stem, denoising, video_3THW in zip(stems, denoisings, videos, strict=True)
        ]
        vae.to("cpu")
    for path in paths:
        say(f"saved {path}")
    return paths


def _free_stems(folder: Path, seeds: Sequence[int | str]) -> list[str]:
    """One file name stem (time, seed) per seed, in order of time; none is in use in `folder` or given twice."""
    stems = []
    moment = datetime.now()
    for seed in seeds:
        while any(folder.glob(f"{_time_flag(moment)}_{glob.escape(str(seed))}*")):
            moment += timedelta(milliseconds=1)
        stems.append(f"{_time_flag(moment)}_{seed}")
        moment += timedelta(milliseconds=1)
    return stems


def _time_flag(moment: datetime) -> str:
    return f"{moment:%Y%m%d-%H%M%S}-{moment.microsecond // 1000:03d}"


def _latent_metadata(sample: Sample) -> dict[str, str]:
    values = {
        "seeds": sample.seed,
        "prompt": sample.prompt,
        "height": sample.height,
        "width": sample.width,
        "video_length": sample.frames,
        "infer_steps": sample.steps,
        "guidance_scale": sample.guidance_scale,
        "negative_prompt": sample.negative_prompt,
        **picture_names(sample),
    }
    return {key: str(value) for key, value in values.items()}


def _settings(sample: Sample, experts: Sequence[Expert]) -> dict[str, object]:
    *high, low = experts
    return sample_settings(
        sample,
        guidance_scale_high_noise=high[0].guidance_scale if high else None,
        model=low.path.stem,
        model_high_noise=high[0].path.stem if high else None,
        slices=[entry.label for expert in experts for entry in expert.slices.entries],
        loras=[file.label for file in low.loras],
        loras_high_noise=[file.label for expert in high for file in expert.loras],
    )


def _save_video(
    config: GenerateConfig, vae: WanVAE, video_3THW: Tensor, stem: str, settings: Mapping[str, object]
) -> Path:
    if not config.write_metadata:
        settings = writers.NO_SETTINGS
    if config.output_type in _FRAME_OUTPUTS:
        return writers.save_frames(config.save_path, stem, video_3THW, settings)
    fps = vae.kind.layout.fps if config.fps is None else config.fps
    return writers.save_sample(config.save_path, stem, video_3THW, fps, settings)


def decode_latent_files(config: GenerateConfig, say: Callable[[str], None]) -> list[Path]:
    """Decodes the latents of --latent_path and saves them; returns the paths."""
    loaded = [writers.load_latent(path) for path in config.latent_paths]
    vae = _vae_of_latents(config, {len(latent_CFHW) for latent_CFHW, _ in loaded})
    writers.remove_unfinished(config.save_path)
    stems = _free_stems(config.save_path, [file_name(metadata.get("seeds", "0")) for _, metadata in loaded])
    paths, videos = [], decode_latents(vae, [latent_CFHW for latent_CFHW, _ in loaded])
    for source, stem, (_, metadata), video_3THW in zip(config.latent_paths, stems, loaded, videos, strict=True):
        settings = settings_of_latent(metadata)
        paths.append(_save_video(config, vae, video_3THW, file_name(f"{stem}_{source.stem}"), settings))
        say(f"saved {paths[-1]}")
    return paths


def _vae_of_latents(config: GenerateConfig, channels: set[int]) -> WanVAE:
    """The VAE of latents with these channels, whatever the task is: it is the one that they were made for."""
    if len(channels) > 1:
        raise InputError(
            f"--latent_path: the files have latents of {' and '.join(map(str, sorted(channels)))} channels, which are "
            "of different VAEs: decode them one kind after the other"
        )
    return load_vae(config.vae, config.vae_dtype, config.device, channels.pop())

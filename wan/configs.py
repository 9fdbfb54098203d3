"""The shapes of the Wan models, and the sampling defaults of each task."""

from dataclasses import dataclass, replace
from typing import Literal

DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_PICTURE_PREFIX = "镜头晃动，"
_TWO_PICTURES_PREFIX = "镜头切换，" + _PICTURE_PREFIX


@dataclass(frozen=True)
class Conditions:
    """What a model is given beside noisy latents and text: pictures of the clip, as latents and as CLIP tokens."""

    pictures: int = 0  # 1: the first frame, 2: the first and the last, joined to the latents as y
    clip: bool = False  # and CLIP tokens of each

    def are_all_of(self, frames: int) -> bool:
        """Whether a clip of that many frames is given as a whole, so that nothing of it is left to predict."""
        return self.pictures > 0 and frames == 1


NO_CONDITIONS = Conditions()
# ti2v reads a first frame too, but as a part of its noisy latents.
_PICTURES = {"t2v": 0, "ti2v": 0, "i2v": 1, "flf2v": 2}


@dataclass(frozen=True)
class WanConfig:
    """The widths of one transformer; the names are those of the original config.json.

    `image_dim`, which is not in it, is the width of the CLIP tokens that Wan 2.1's image-to-video models read.
    """

    model_type: Literal["t2v", "i2v", "flf2v", "ti2v"]
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int = 4096
    freq_dim: int = 256
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    image_dim: int | None = None

    @property
    def conditions(self) -> Conditions:
        """What it is given beside noisy latents and text."""
        return Conditions(_PICTURES[self.model_type], self.image_dim is not None)

    @property
    def starts_from_latents(self) -> bool:
        """Whether a first frame is given to the model as a clean one among its noisy latents, at timestep 0."""
        return self.model_type == "ti2v"


@dataclass(frozen=True)
class LatentLayout:
    """How a VAE lays out a video: the channels of a latent, and what one latent value covers in time and space.

    `fps` is the frame rate of the videos that the models with this VAE were trained on.
    """

    channels: int
    frame_stride: int
    pixel_stride: int
    fps: int

    @property
    def pixel_multiple(self) -> int:
        """What both sides of a picture are multiples of: the transformer takes 2x2 latent values as one token."""
        return 2 * self.pixel_stride

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latent of a clip."""
        return self.channels, self.latent_frames(frames), height // self.pixel_stride, width // self.pixel_stride

    def latent_frames(self, frames: int) -> int:
        """The first frame has a latent frame of its own."""
        return (frames - 1) // self.frame_stride + 1

    def whole_frames(self, frames: int) -> int:
        """The most frames, at most `frames`, that latent frames cover exactly: 1, 5, 9, ... at a stride of 4."""
        return (frames - 1) // self.frame_stride * self.frame_stride + 1


WAN_2_1_VAE = LatentLayout(16, 4, 8, fps=16)
WAN_2_2_VAE = LatentLayout(48, 4, 16, fps=24)  # of ti2v-5B


_720P = ((1280, 720), (720, 1280))
_480P = ((832, 480), (480, 832))


@dataclass(frozen=True)
class WanTask:
    """A value of `--task`: an architecture, the layout of its latents, its sampling defaults.

    Above `boundary` (a share of the 1000 timesteps) the high-noise expert samples, with `guidance_scale_high`. `sizes`
    are those that Wan recommends, as (width, height), the default first; `flow_shift_480p` is for those of 480p.
    """

    name: str
    config: WanConfig
    latents: LatentLayout = WAN_2_1_VAE
    boundary: float | None = None
    flow_shift: float = 5.0
    flow_shift_480p: float | None = None
    infer_steps: int = 50
    guidance_scale: float = 5.0
    guidance_scale_high: float | None = None
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    video_length: int = 81
    sizes: tuple[tuple[int, int], ...] = _720P + _480P

    @property
    def fps(self) -> int:
        return self.latents.fps

    @property
    def conditions(self) -> Conditions:
        """What is cached beside the latents of a clip that is trained on."""
        return self.config.conditions

    def shift_at(self, width: int, height: int) -> float:
        """The default flow shift of a video of this size."""
        is_480p = self.flow_shift_480p is not None and (width, height) in _480P
        return self.flow_shift_480p if is_480p else self.flow_shift


_T2V_1_3B = WanConfig("t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16)
_T2V_14B = WanConfig("t2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
_I2V_A14B = replace(_T2V_14B, model_type="i2v", in_dim=36)
_I2V_14B = replace(_I2V_A14B, image_dim=1280)
_FLF2V_14B = replace(_I2V_14B, model_type="flf2v")
_TI2V_5B = WanConfig("ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)

TASKS: dict[str, WanTask] = {
    task.name: task
    for task in (
        WanTask("t2v-1.3B", _T2V_1_3B, sizes=_480P),
        WanTask("t2v-14B", _T2V_14B),
        WanTask("t2i-14B", _T2V_14B, video_length=1, sizes=(*_720P, *_480P, (1024, 1024))),
        WanTask(
            "t2v-A14B",
            _T2V_14B,
            boundary=0.875,
            flow_shift=12.0,
            infer_steps=40,
            guidance_scale=3.0,
            guidance_scale_high=4.0,
        ),
        WanTask(
            "i2v-14B",
            _I2V_14B,
            flow_shift_480p=3.0,
            infer_steps=40,
            negative_prompt=_PICTURE_PREFIX + DEFAULT_NEGATIVE_PROMPT,
        ),
        WanTask("i2v-A14B", _I2V_A14B, boundary=0.900, infer_steps=40, guidance_scale=3.5, guidance_scale_high=3.5),
        WanTask(
            "flf2v-14B", _FLF2V_14B, flow_shift=16.0, negative_prompt=_TWO_PICTURES_PREFIX + DEFAULT_NEGATIVE_PROMPT
        ),
        WanTask("ti2v-5B", _TI2V_5B, WAN_2_2_VAE, video_length=121, sizes=((1280, 704), (704, 1280))),
    )
}

"""The shapes of the Wan models, and the sampling defaults of each task."""

from dataclasses import dataclass
from typing import Literal

DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class WanConfig:
    """The widths of one transformer; the names are those of the original config.json."""

    model_type: Literal["t2v", "i2v", "ti2v"]
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


@dataclass(frozen=True)
class LatentLayout:
    """How a VAE lays out a video: the channels of a latent, and what one latent value covers in time and space."""

    channels: int
    frame_stride: int
    pixel_stride: int

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


WAN_2_1_VAE = LatentLayout(16, 4, 8)
WAN_2_2_VAE = LatentLayout(48, 4, 16)  # of ti2v-5B


@dataclass(frozen=True)
class WanTask:
    """A value of `--task`: an architecture, its sampling defaults, the layout of its latents.

    Above `boundary` (a share of the 1000 timesteps) the high-noise expert samples, with `guidance_scale_high`.
    """

    name: str
    config: WanConfig
    boundary: float | None
    flow_shift: float
    infer_steps: int
    guidance_scale: float
    guidance_scale_high: float | None
    fps: int
    video_length: int
    latents: LatentLayout


_T2V_1_3B = WanConfig("t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16)
_T2V_14B = WanConfig("t2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
_I2V_A14B = WanConfig("i2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16)
_TI2V_5B = WanConfig("ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)

TASKS: dict[str, WanTask] = {
    task.name: task
    for task in (
        WanTask("t2v-1.3B", _T2V_1_3B, None, 5.0, 50, 5.0, None, 16, 81, WAN_2_1_VAE),
        WanTask("t2v-14B", _T2V_14B, None, 5.0, 50, 5.0, None, 16, 81, WAN_2_1_VAE),
        WanTask("t2i-14B", _T2V_14B, None, 5.0, 50, 5.0, None, 16, 1, WAN_2_1_VAE),
        WanTask("t2v-A14B", _T2V_14B, 0.875, 12.0, 40, 3.0, 4.0, 16, 81, WAN_2_1_VAE),
        WanTask("i2v-A14B", _I2V_A14B, 0.900, 5.0, 40, 3.5, 3.5, 16, 81, WAN_2_1_VAE),
        WanTask("ti2v-5B", _TI2V_5B, None, 5.0, 50, 5.0, None, 24, 121, WAN_2_2_VAE),
    )
}
# The others' files are recognised, and refused.
SUPPORTED_TASKS = tuple(name for name, task in TASKS.items() if task.config.model_type == "t2v")

"""HDR and wide-gamut pixels as sRGB (ITU-R BT.2100, BT.2390, BT.2408).

H W height and width, C the three colours.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics as ITU-T H.273 numbers them
_PEAK = 1000.0  # nits, of the displays that HDR is graded on; what is brighter becomes white
_WHITE = 203.0  # nits, of white paper in HDR (BT.2408), which sRGB's white becomes
_HLG_GAMMA = 1.2  # of a display of 1000 nits (BT.2100 table 5)
# Linear RGB of H.273's primaries to that of sRGB: BT.2020 (BT.2087) and Display P3.
WIDE_GAMUTS = {
    9: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    12: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


@dataclass(frozen=True)
class Light:
    """What a file says about its light: transfer function and primaries, by H.273's numbers."""

    transfer: int
    primaries: int

    @property
    def is_hdr(self) -> bool:
        return self.transfer in (PQ, HLG)


def coded_light(transfer: int, primaries: int) -> Light | None:
    """The light, if its pixels cannot be taken as sRGB as they are."""
    light = Light(transfer, primaries)
    return light if light.is_hdr or primaries in WIDE_GAMUTS else None


def to_srgb_pixels(pixels_HWC: np.ndarray, light: Light) -> np.ndarray:
    """uint16 [H, W, 3], full range, as uint8 sRGB: highlights are compressed, colours outside sRGB clipped."""
    linear_HWC = _linear(light.transfer)[pixels_HWC]
    if light.transfer == HLG:  # from the light of the scene to that of a display
        luminance_HW = linear_HWC @ _LUMINANCE_2020
        linear_HWC *= (_PEAK / _WHITE) * (luminance_HW ** (_HLG_GAMMA - 1))[..., None]
    if light.is_hdr:
        brightest_HW = linear_HWC.max(-1)
        linear_HWC *= _compression(brightest_HW)[..., None]
    # HDR without primaries has always been BT.2020.
    matrix = WIDE_GAMUTS.get(light.primaries, WIDE_GAMUTS[9] if light.primaries == 2 and light.is_hdr else None)
    if matrix is not None:
        linear_HWC = linear_HWC @ np.array(matrix, np.float32).T
    return _srgb_levels()[np.rint(linear_HWC.clip(0, 1) * 65535).astype(np.uint16)]


def pq_nits(signal: np.ndarray) -> np.ndarray:
    """BT.2100's PQ EOTF: nits of a signal from 0 to 1."""
    power = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def pq_signal(nits: np.ndarray) -> np.ndarray:
    """The inverse of pq_nits."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """BT.2100's inverse HLG OETF: the light of the scene, from 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def compressed_nits(nits: np.ndarray) -> np.ndarray:
    """BT.2390's curve from a display of 1000 nits to one of 203: only bright tones are compressed."""
    peak = pq_signal(_PEAK)
    signal = np.minimum(pq_signal(nits) / peak, 1)
    top = pq_signal(_WHITE) / peak
    knee = 1.5 * top - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return pq_nits(np.where(signal < knee, signal, spline) * peak)


@lru_cache(maxsize=4)
def _linear(transfer: int) -> np.ndarray:
    """For each 16-bit sample its light: 1 is white, for HLG the light of the scene."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        light = pq_nits(signal) / _WHITE
    elif transfer == HLG:
        light = hlg_light(signal)
    else:
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def _compression(brightest: np.ndarray) -> np.ndarray:
    """What light is multiplied by, where the brightest of its three colours is `brightest` (1 is white)."""
    # By a table over the square root, because dark values need finer steps.
    steps = np.sqrt(brightest * (_WHITE / 10000)).clip(0, 1) * 65535
    return _compression_table()[np.rint(steps).astype(np.uint16)]


@lru_cache(maxsize=1)
def _compression_table() -> np.ndarray:
    nits = (np.arange(65536) / 65535) ** 2 * 10000
    nits[0] = nits[1]
    return (compressed_nits(nits) / nits).astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_levels() -> np.ndarray:
    light = np.arange(65536) / 65535
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * levels).astype(np.uint8)

"""High dynamic range and wide gamut to what a standard display shows: BT.709 primaries, BT.1886 (gamma 2.4).

PQ and HLG (ITU-R BT.2100) become light in nits, HLG as on a display of 1000 nits. Tone mapping is method C of
ITU-R BT.2446-1 on the luminance, by which 203 nits, the reference white of BT.2408, come to 96 % of the
signal; colors keep their chromaticity. Then the primaries become those of BT.709, and what lies outside is
clipped.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PQ, HLG = 16, 18  # AVColorTransferCharacteristic
LIGHT = {8: "linear", 17: "SMPTE ST 428"}  # other transfers that are not near BT.1886
WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "P3-D65"}  # primaries that differ visibly from BT.709
GAMMA = 2.4
D65 = (0.3127, 0.3290)
CHROMATICITIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
}
PEAK = 1000.0  # nits of the display that HLG is meant for


@lru_cache
def _to_xyz(primaries: int) -> np.ndarray:
    """Linear RGB to XYZ, with white at Y = 1 (SMPTE RP 177)."""
    *colors, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in CHROMATICITIES[primaries])
    matrix = np.stack(colors, 1)
    return matrix * np.linalg.solve(matrix, white)


@lru_cache
def _to_709(primaries: int) -> Tensor:
    """Linear RGB to that of BT.709; white stays white."""
    matrix = np.linalg.solve(_to_xyz(1), _to_xyz(primaries))
    return torch.from_numpy(matrix / matrix.sum(1, keepdims=True)).float()


def pq_nits(signal: Tensor) -> Tensor:
    """The EOTF of SMPTE ST 2084."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = signal.clamp(0, 1) ** (1 / m2)
    return 10000 * ((root - c1).clamp(min=0) / (c2 - c3 * root)) ** (1 / m1)


def hlg_scene(signal: Tensor) -> Tensor:
    """The inverse OETF of HLG: light of the scene in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = signal.clamp(0, 1)
    return torch.where(signal <= 0.5, signal * signal / 3, (((signal - c) / a).exp() + b) / 12)


def tone(nits: Tensor) -> Tensor:
    """Luminance of HDR to that of SDR, in [0, 1]: BT.2446-1, method C, with its own constants."""
    k1, k2, k3, k4 = 0.83802, 15.09968, 0.74204, 78.99439
    knee = 58.5 / k1
    bright = k2 * (nits.clamp(min=knee) / knee - k3).log() + k4
    return torch.where(nits < knee, k1 * nits, bright).clamp(max=100) / 100


@lru_cache
def _table(transfer: int) -> Tensor:
    """Light for each of 65536 codes: nits of PQ, of the scene for HLG, else with white at 1."""
    signal = torch.linspace(0, 1, 65536, dtype=torch.float64)
    if transfer == PQ:
        light = pq_nits(signal)
    elif transfer == HLG:
        light = hlg_scene(signal)
    elif transfer == 8:
        light = signal
    elif transfer == 17:
        light = signal**2.6 * 52.37 / 48
    else:
        light = signal**GAMMA
    return light.float()


@lru_cache
def _display() -> Tensor:
    """The codes of BT.1886 for light in steps of 1/65535."""
    return torch.linspace(0, 255, 65536).div_(255).pow_(1 / GAMMA).mul_(255).round_().to(torch.uint8)


def to_sdr(codes: Tensor, transfer: int, primaries: int) -> Tensor:
    """RGB codes (3, H, W), int32 in 0 .. 65535, as uint8 of BT.709.

    transfer, primaries: as tagged, numbers of ITU-T H.273; primaries that are not wide count as BT.709.
    """
    light = _table(transfer)[codes]
    source = primaries if primaries in WIDE else 1
    weights = torch.from_numpy(_to_xyz(source)[1]).float()
    luminance = torch.einsum("c,chw->hw", weights, light)
    if transfer == HLG:
        light *= PEAK * luminance.pow(0.2)
        luminance = torch.einsum("c,chw->hw", weights, light)
    if transfer in (PQ, HLG):
        light *= tone(luminance) / luminance.clamp(min=1e-6)
    if source != 1:
        light = torch.einsum("dc,chw->dhw", _to_709(source), light)
    return _display()[light.clamp_(0, 1).mul_(65535).round_().int()]

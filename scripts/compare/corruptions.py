"""Damaged test images: what a model is worth where the images are not those it was trained on.

In the spirit of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, https://arxiv.org/abs/1903.12261: five of its kinds, each
mild and strong, in a form of their own that suits images from 8 x 8 pixels up. Scores are not to be
compared with those of CIFAR-10-C. The pixels x, of shape (images,
channels, height, width), are from 0 to 1:

    gaussian_noise    x + σ z, z ~ N(0, 1), the same z for every model
    gaussian_blur     x * Gaussian with standard deviation σ in pixels, edges repeated
    contrast          mean + c (x - mean), mean over the image, of each channel
    brightness        x + b
    pixelate          averaged down to a share of the side, and up again by the nearest pixel

and all of it is clipped to [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# σ, σ, c, b and the share of the side: mild, strong.
CORRUPTIONS: dict[str, tuple[float, float]] = {
    "gaussian_noise": (0.1, 0.2),
    "gaussian_blur": (0.5, 1.0),
    "contrast": (0.5, 0.25),
    "brightness": (0.15, 0.3),
    "pixelate": (0.75, 0.5),
}


def corrupt(pixels: Tensor, kind: str, severity: float, seed: int = 0) -> Tensor:
    """Damaged copies of the images; the same for the same seed.

    Args:
        severity: the number in the table above. Those of `CORRUPTIONS` are used.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind={kind!r} is not allowed. Allowed: {', '.join(CORRUPTIONS)}.")
    if kind == "gaussian_noise":
        generator = torch.Generator().manual_seed(seed)
        damaged = pixels + severity * torch.randn(pixels.shape, generator=generator)
    elif kind == "gaussian_blur":
        damaged = _blur(pixels, severity)
    elif kind == "contrast":
        mean = pixels.mean(dim=(2, 3), keepdim=True)
        damaged = mean + severity * (pixels - mean)
    elif kind == "brightness":
        damaged = pixels + severity
    else:
        damaged = _pixelate(pixels, severity)
    return damaged.clamp(0, 1)


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    reach = min(max(1, round(3 * sigma)), *(side - 1 for side in pixels.shape[-2:]))
    offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    channels = pixels.shape[1]
    padded = functional.pad(pixels, (reach,) * 4, mode="replicate")
    rows = kernel.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1)
    blurred = functional.conv2d(padded, rows, groups=channels)
    return functional.conv2d(blurred, rows.transpose(2, 3), groups=channels)


def _pixelate(pixels: Tensor, share: float) -> Tensor:
    sides = pixels.shape[-2:]
    smaller = [max(1, round(share * side)) for side in sides]
    # Each pixel counts by its area in the larger one: copies of it, of which whole numbers fit.
    common = [math.gcd(side, small) for side, small in zip(sides, smaller, strict=True)]
    copies = [small // c for small, c in zip(smaller, common, strict=True)]
    fine = pixels.repeat_interleave(copies[0], dim=-2).repeat_interleave(copies[1], dim=-1)
    reach = [side // c for side, c in zip(sides, common, strict=True)]
    return functional.interpolate(
        functional.avg_pool2d(fine, reach), size=tuple(sides), mode="nearest-exact"
    )

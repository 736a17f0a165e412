"""Corrupted test images.

Five kinds of corruption after Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019, https://arxiv.org/abs/1903.12261, in forms that
suit images from 8 x 8 pixels up: scores are not comparable with those of CIFAR-10-C. The pixels x,
of shape (images, channels, height, width), are from 0 to 1, and the result is clipped to that:

    gaussian_noise    x + σ z, z ~ N(0, 1), the same z for every model
    gaussian_blur     x * Gaussian with standard deviation σ in pixels, edges repeated
    contrast          mean + c (x - mean), mean over the image, of each channel
    brightness        x + b
    pixelate          averaged down to a share of the side, and up again by the nearest pixel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# Mild and strong.
CORRUPTIONS: dict[str, tuple[float, float]] = {
    "gaussian_noise": (0.1, 0.2),
    "gaussian_blur": (0.5, 1.0),
    "contrast": (0.5, 0.25),
    "brightness": (0.15, 0.3),
    "pixelate": (0.75, 0.5),
}


def corrupt(pixels: Tensor, kind: str, severity: float, seed: int = 0) -> Tensor:
    """Corrupted copies of the images.

    Args:
        kind: one of `CORRUPTIONS`.
        severity: σ, c, b or the share of the side.
    """
    if kind == "gaussian_noise":
        generator = torch.Generator().manual_seed(seed)
        corrupted = pixels + severity * torch.randn(pixels.shape, generator=generator)
    elif kind == "gaussian_blur":
        corrupted = _blur(pixels, severity)
    elif kind == "contrast":
        mean = pixels.mean(dim=(2, 3), keepdim=True)
        corrupted = mean + severity * (pixels - mean)
    elif kind == "brightness":
        corrupted = pixels + severity
    else:
        corrupted = _pixelate(pixels, severity)
    return corrupted.clamp(0, 1)


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

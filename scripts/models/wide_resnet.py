r"""Wide residual networks for small images, as models of transformers.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146.
WRN-d-k has depth d = 6 n + 4 and width k: a 3 x 3 convolution, three groups of n blocks with 16 k,
32 k and 64 k channels (the second and third halve the image), and a linear layer on the mean over
the image. A block is the paper's B(3,3) in pre-activation form:

    x -> x + conv3x3(drop(relu(bn(conv3x3(relu(bn(x)))))))

Where the shape changes, the shortcut is a 1 x 1 convolution of relu(bn(x)), as in the authors'
code.
`AutoModelForImageClassification` knows the model once this module is imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class WideResNetConfig(PreTrainedConfig):
    """
    Args:
        depth: 6 n + 4: 10, 16, 22, 28, 40.
        width: the factor k of the channels.
        dropout: the share of channels' values dropped between the convolutions of a block.

    Raises:
        ValueError: there is no such network of this size.
    """

    model_type = "wide_resnet"
    main_input_name = "pixel_values"

    depth: int = 16
    width: int = 8
    dropout: float = 0.0
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(
                f"depth={self.depth} is not allowed. Allowed: 6 n + 4 for n = 1, 2, 3, ..."
            )
        if self.width < 1:
            raise ValueError(f"width={self.width} is not allowed. Allowed: 1 and more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not allowed. Allowed: from 0 to below 1.")


class WideBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(channels, channels)
        is_same_shape = channels_in == channels and stride == 1
        self.shortcut = (
            None if is_same_shape else nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        out = functional.relu(self.bn2(self.conv1(active)))
        return kept + self.conv2(self.dropout(out))


class WideResNetForImageClassification(PreTrainedModel):
    """Logits for images of any size, and the cross-entropy where labels are given."""

    config_class = WideResNetConfig
    base_model_prefix = "wide_resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        channels = [16, *(base * config.width for base in (16, 32, 64))]
        self.conv = _conv3x3(config.num_channels, channels[0])
        self.groups = nn.ModuleList(
            _group(channels[i], channels[i + 1], (config.depth - 4) // 6, i, config.dropout)
            for i in range(3)
        )
        self.bn = nn.BatchNorm2d(channels[-1])
        self.classifier = nn.Linear(channels[-1], config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        x = self.conv(pixel_values)
        for group in self.groups:
            x = group(x)
        logits = self.classifier(functional.relu(self.bn(x)).mean(dim=(2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
        is_dict = self.config.return_dict if return_dict is None else return_dict
        return output if is_dict else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # as the authors do: fan_out, for ReLU
            initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
            initialization.zeros_(module.running_mean)
            initialization.ones_(module.running_var)
            initialization.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear):
            initialization.kaiming_normal_(module.weight, nonlinearity="relu")
            initialization.zeros_(module.bias)


def _group(
    channels_in: int, channels: int, blocks: int, index: int, dropout: float
) -> nn.Sequential:
    first = WideBlock(channels_in, channels, stride=1 if index == 0 else 2, dropout=dropout)
    rest = (WideBlock(channels, channels, 1, dropout) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _conv3x3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)


AutoConfig.register(WideResNetConfig.model_type, WideResNetConfig)
AutoModelForImageClassification.register(WideResNetConfig, WideResNetForImageClassification)

r"""SAMformer, a transformer for multivariate time series forecasting, as a model of transformers.

Ilbert, Odonnat, Feofanov, Virmaux, Paolo, Palpanas and Redko, "SAMformer: Unlocking the Potential
of Transformers in Time Series Forecasting with Sharpness-Aware Minimization and Channel-Wise
Attention", ICML 2024, https://arxiv.org/abs/2402.10198. With D channels, a context of L steps, a
horizon of H steps and queries and keys of width d_m, for a window X of shape (D, L):

    X  <- RevIN(X)                                                  (D, L)
    A  =  softmax((X W_Q) (X W_K)^T / sqrt(d_m))                    (D, D), over the channels
    Y  =  (X + A (X W_V)) W                                         (D, H)
    Y  <- RevIN^-1(Y)                                               (D, H)

W_Q and W_K have shape (L, d_m), W_V (L, L), W (L, H); each has a bias. The paper's W_V W_O, of rank
d_m, is one matrix here, as in the authors' code: https://github.com/romilbert/samformer. RevIN is
reversible instance normalisation (Kim et al., ICLR 2022): each channel of a window is standardised
by its own mean and standard deviation over the context, then scaled and shifted by learned factors.

`AutoModelForTimeSeriesPrediction` knows the model once this module is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForTimeSeriesPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.utils import ModelOutput


class SAMformerConfig(PreTrainedConfig):
    """
    Args:
        context_length: L, the steps that the model sees.
        prediction_length: H, the steps that it forecasts.
        num_input_channels: D.
        d_model: d_m, the width of queries and keys.
        norm_eps: is added to RevIN's variance.

    Raises:
        ValueError: a size below 1.
    """

    model_type = "samformer"

    context_length: int = 512
    prediction_length: int = 96
    num_input_channels: int = 7
    d_model: int = 16
    norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("context_length", "prediction_length", "num_input_channels", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed. Allowed: 1 and up.")


@dataclass
class SAMformerOutput(ModelOutput):
    """`prediction_outputs` has shape (batch, prediction_length, num_input_channels)."""

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None


class RevIN(nn.Module):
    """Reversible instance normalisation over the last axis of (batch, channels, steps)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(Tensor(channels, 1))
        self.bias = nn.Parameter(Tensor(channels, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised window, and the mean and the standard deviation that `inverse` takes."""
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        std = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / std * self.weight + self.bias, mean, std

    def inverse(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (y - self.bias) / self.weight * std + mean


class SAMformerForPrediction(PreTrainedModel):
    """Forecasts all channels of a window, and the mean squared error where the future is given."""

    config_class = SAMformerConfig
    base_model_prefix = "samformer"
    main_input_name = "past_values"

    def __init__(self, config: SAMformerConfig) -> None:
        super().__init__(config)
        length = config.context_length
        self.revin = RevIN(config.num_input_channels, config.norm_eps)
        self.query = nn.Linear(length, config.d_model)
        self.key = nn.Linear(length, config.d_model)
        self.value = nn.Linear(length, length)
        self.head = nn.Linear(length, config.prediction_length)
        self.post_init()

    def forward(
        self,
        past_values: Tensor,  # (batch, context_length, num_input_channels)
        future_values: Tensor | None = None,  # (batch, prediction_length, num_input_channels)
        return_dict: bool | None = None,
    ) -> Any:
        x, mean, std = self.revin(past_values.transpose(1, 2).contiguous())
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(self.config.d_model)
        # (X + A (X W_V)) W = X W + A (X (W_V W)), which costs less while H is well below L. The
        # rows of A sum to 1: the value's bias may be added before the attention.
        head = self.head.weight
        values = functional.linear(x, head @ self.value.weight, head @ self.value.bias)
        y = self.head(x) + scores.softmax(-1) @ values
        forecast = self.revin.inverse(y, mean, std).transpose(1, 2)
        loss = None if future_values is None else functional.mse_loss(forecast, future_values)
        output = SAMformerOutput(loss=loss, prediction_outputs=forecast)
        is_dict = self.config.return_dict if return_dict is None else return_dict
        return output if is_dict else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # torch's own, as in the authors' code
            bound = 1 / math.sqrt(module.in_features)
            initialization.uniform_(module.weight, -bound, bound)
            initialization.uniform_(module.bias, -bound, bound)
        elif isinstance(module, RevIN):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)


AutoConfig.register(SAMformerConfig.model_type, SAMformerConfig)
AutoModelForTimeSeriesPrediction.register(SAMformerConfig, SAMformerForPrediction)

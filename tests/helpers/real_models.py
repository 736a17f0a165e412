"""Models of transformers, tiny and with random weights in float64, and rows that fit them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TEXT = {"vocab_size": 19, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokens(n: int, length: int = 7, low: int = 3) -> list[Tensor]:
    return list(torch.randint(low, 19, (n, length)))


def language(n: int = 12) -> list[dict[str, Tensor]]:
    """The first label does not count: nothing predicts it, and yet some Trainers count it."""
    skip = torch.tensor([-100])
    return [{"input_ids": ids, "labels": torch.cat([skip, ids[1:]])} for ids in tokens(n)]


def sequence_to_sequence(n: int = 12) -> list[dict[str, Tensor]]:
    """With padded labels, which the model shifts into decoder inputs of its own."""
    rows = [
        {"input_ids": source, "labels": target}
        for source, target in zip(tokens(n), tokens(n, 5), strict=True)
    ]
    for i, row in enumerate(rows):
        row["labels"][3 + i % 3 :] = -100
    return rows


def pictures(n: int = 12) -> list[dict[str, Tensor]]:
    labels = torch.randint(3, (n,))
    return [{"pixel_values": torch.randn(3, 16, 16).double(), "labels": y} for y in labels]


def gpt2(**options: Any) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **TEXT, **options)
    ).double()


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, **TEXT)).double()


def mixtral() -> nn.Module:
    """With more experts than a batch of few tokens can use."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 32, "num_experts_per_tok": 1, "output_router_logits": True}
    experts["experts_implementation"] = "eager"
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads, **experts, **TEXT)).double()


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, decoder_start_token_id=0, **TEXT)
    ).double()


def bart() -> nn.Module:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "layers": 1,
            "attention_heads": 2,
            "ffn_dim": 24,
            "layerdrop": 0.3,
        }.items()
    }
    config = hf.BartConfig(d_model=16, max_position_embeddings=16, **sides, **TEXT)
    return hf.BartForConditionalGeneration(config).double()


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = hf.BertConfig(**sizes, num_attention_heads=2, num_labels=3, **TEXT)
    return hf.BertForSequenceClassification(config).double()


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = hf.ViTConfig(
        **sizes,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.1,
    )
    return hf.ViTForImageClassification(config).double()


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return hf.ResNetForImageClassification(config).double()


def wav2vec2() -> nn.Module:
    """SpecAugment and LayerDrop, drawn with NumPy and with torch."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (3, 2)}
    masks = {
        "mask_time_prob": 0.4,
        "mask_time_length": 2,
        "mask_feature_prob": 0.3,
        "mask_feature_length": 2,
        "layerdrop": 0.3,
    }
    config = hf.Wav2Vec2Config(
        **sizes,
        **convolutions,
        **masks,
        num_attention_heads=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        num_labels=3,
        classifier_proj_size=8,
    )
    return hf.Wav2Vec2ForSequenceClassification(config).double()


def whisper() -> nn.Module:
    """SpecAugment in place: the model overwrites the features that it is given."""
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    masks = {
        "apply_spec_augment": True,
        "mask_time_prob": 0.4,
        "mask_time_length": 2,
        "mask_feature_prob": 0.3,
        "mask_feature_length": 2,
    }
    config = hf.WhisperConfig(
        **sizes,
        **masks,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=8,
        decoder_start_token_id=1,
        **TEXT,
    )
    return hf.WhisperForConditionalGeneration(config).double()


def audio(n: int = 12) -> list[dict[str, Tensor]]:
    labels = torch.randint(3, (n,))
    return [{"input_values": torch.randn(160).double(), "labels": y} for y in labels]


def spectra(n: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_features": torch.randn(8, 20).double(), "labels": ids} for ids in tokens(n, 5)]


REAL = [
    (gpt2, language),
    (llama, language),
    (mixtral, language),
    (t5, sequence_to_sequence),
    (bart, sequence_to_sequence),
    (bert, lambda: [{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens(12)]),
    (vit, pictures),
    (resnet, pictures),
    (wav2vec2, audio),
    (whisper, spectra),
]

"""Selection and grouping of parameters: by module type, on torch's and transformers' models."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sam_hf.engine.parameters import parameter_groups, select_parameters, sparse_parameters

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def vit():
    return ViTForImageClassification(
        ViTConfig(**SMALL, intermediate_size=8, image_size=4, patch_size=2)
    )


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=8, vocab_size=9))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=8, vocab_size=9))


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    )


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    )


def members(model, group):
    return {name for name, its_group in parameter_groups(model).items() if its_group == group}


@pytest.mark.parametrize(
    ("build", "group", "expected"),
    [
        (vit, "norms", {"layernorm_before", "layernorm_after", "layernorm"}),
        (bert, "norms", {"LayerNorm"}),
        (gpt2, "norms", {"ln_1", "ln_2", "ln_f"}),
        (llama, "norms", {"input_layernorm", "post_attention_layernorm", "norm"}),
        (t5, "norms", {"layer_norm", "final_layer_norm"}),
        (resnet, "norms", {"normalization"}),
    ],
)
def test_norm_layers_are_found_by_their_type(build, group, expected):
    found = members(build(), group)
    assert found
    assert {name.rsplit(".", 2)[-2] for name in found} == expected


def test_a_norm_in_the_name_alone_is_no_norm():
    model = nn.ModuleDict({"norm": nn.Linear(2, 2), "other": nn.LayerNorm(2)})
    assert members(model, "norms") == {"other.weight", "other.bias"}
    assert members(model, "matrices") == {"norm.weight"}


def test_embeddings_are_tables_positions_and_class_tokens():
    assert members(vit(), "embeddings") == {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
    }
    assert members(gpt2(), "embeddings") == {"transformer.wte.weight", "transformer.wpe.weight"}
    # the convolution that makes patches is a matrix, and a head tied to a table is not there twice
    assert any("projection.weight" in name for name in members(vit(), "matrices"))
    assert not any("lm_head" in name for name in parameter_groups(gpt2()))


@pytest.mark.parametrize("build", [vit, bert, gpt2, llama, t5, resnet])
def test_every_parameter_has_one_group_under_its_own_name(build):
    model = build()
    assert parameter_groups(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("build", [vit, bert, gpt2, llama])
def test_matrices_are_neither_norms_nor_embeddings_nor_biases(build):
    for name, parameter in select_parameters(build(), "matrices").items():
        assert parameter.ndim >= 2
        assert "embeddings.word" not in name and "wte" not in name and "norm" not in name.lower()


def test_a_regular_expression_is_searched_in_the_names():
    chosen = select_parameters(bert(), r"attention\..*\.bias$")
    assert len(chosen) == 5
    assert all("attention" in name and name.endswith(".bias") for name in chosen)


def test_selecting_nothing_raises_with_the_value_and_names_to_choose_from():
    with pytest.raises(ValueError, match=r"sam_params='atention' selects no .*Allowed.*bert\."):
        select_parameters(bert(), "atention")
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        select_parameters(frozen, "all")
    with pytest.raises(ValueError, match="sam_params='norms' selects no"):
        select_parameters(nn.Linear(2, 2), "norms")


def test_sparse_embeddings_are_named():
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2))
    assert sparse_parameters(model) == {"0.weight"}

"""`SentenceTransformerTrainer` with SAM: next to the plain trainer, and a twin."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")

import torch
from datasets import Dataset, DatasetDict
from inspection import changes_in_second_passes, snapshot
from reference_sam import sam_step
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from text_trainers import CHARACTERS, TEXTS, tokenizer
from tiny import arguments, assert_same_bits, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from sam_hf import SAMConfig, with_sam

RHO = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """An encoder of two layers with its tokenizer."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    BertModel(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


class Components(nn.Module):
    """A loss of two parts, which the trainer averages on its own for the log."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.ranking = losses.MultipleNegativesRankingLoss(model)

    def forward(self, features: Any, labels: Any) -> dict[str, Tensor]:
        value = self.ranking(features, labels)
        return {"ranking": value, "half": 0.5 * value}


LOSSES = {
    "ranking": losses.MultipleNegativesRankingLoss,
    # Its own backward inside forward, and a second one in a hook.
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "components": Components,
    # A classifier of its own, which belongs to the loss and not to the model.
    "softmax": lambda model: losses.SoftmaxLoss(model, 16, 3),
    "several": lambda model: {
        "pairs": losses.MultipleNegativesRankingLoss(model),
        "scored": losses.CoSENTLoss(model),
    },
    "matryoshka": lambda model: losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model), [16, 8]
    ),
}


def build(folder: str, loss: str, sam: dict[str, Any] | None = None, **args: Any) -> Any:
    model = SentenceTransformer(
        modules=[encoder := Transformer(folder), Pooling(encoder.get_embedding_dimension())],
        device="cpu",
    )
    columns = {"anchor": TEXTS, "positive": [text[::-1] for text in TEXTS]}
    if loss == "softmax":
        columns |= {"label": [i % 3 for i in range(len(TEXTS))]}
    data = Dataset.from_dict(columns)
    if loss == "several":
        scored = data.add_column("label", [float(i % 2) for i in range(len(TEXTS))])
        data = DatasetDict(pairs=data, scored=scored)
    torch.manual_seed(1)
    return (SentenceTransformerTrainer if sam is None else with_sam(SentenceTransformerTrainer))(
        model=model,
        args=arguments(
            SentenceTransformerTrainingArguments,
            **{"gradient_accumulation_steps": 2, "max_steps": 2} | args,
        ),
        train_dataset=data,
        loss=LOSSES[loss](model),
        **({} if sam is None else {"sam_config": SAMConfig(**sam)}),
    )


def run(trainer: Any) -> Any:
    torch.manual_seed(0)
    trainer.train()
    return trainer


def logs(trainer: Any) -> list[dict[str, float]]:
    changed = ("sam_", "grad_norm", "train_", "total_flos")
    return [
        {k: v for k, v in entry.items() if not k.startswith(changed)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("loss", LOSSES)
def test_rho_0_is_the_plain_trainer_to_the_last_bit(folder, loss):
    plain, off = run(build(folder, loss)), run(build(folder, loss, {"sam_rho": 0.0}))
    assert_same_bits(off.model, weights(plain.model))
    if isinstance(plain.loss, nn.Module):
        assert_same_bits(off.loss, weights(plain.loss))
    assert logs(off) == logs(plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_their_parts_are_logged_as_the_plain_trainer_does(folder, loss):
    options = {"learning_rate": 0.0, "max_steps": 3, "logging_steps": 2}
    plain = run(build(folder, loss, **options))
    sam = run(build(folder, loss, {"sam_rho": RHO}, **options))
    assert logs(sam) == logs(plain)
    assert any("sam_sharpness" in entry for entry in sam.state.log_history)
    assert snapshot(sam.accum_loss_components) == snapshot(plain.accum_loss_components)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_second_pass_leaves_the_trainer_as_it_found_it(folder, loss, monkeypatch):
    trainer = build(folder, loss, {"sam_rho": RHO})
    changes = changes_in_second_passes(trainer, monkeypatch)
    run(trainer)
    assert len(changes) == trainer.state.global_step > 0
    assert not any(changes), changes


@pytest.mark.parametrize("loss", ["ranking", "cached"])
def test_one_update_is_that_of_the_twin(folder, loss):
    """Henderson et al., arXiv 1705.00652, section 4.4: the others' positives are negatives."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    sam = build(folder, loss, {"sam_rho": RHO}, **options)
    sam.model.eval()  # no dropout
    twin = copy.deepcopy(sam.model).double()
    monkey = sam.model.train
    sam.model.train = lambda mode=True: monkey(False)
    names = [name for name, _ in twin.named_parameters()]
    w = [p.detach().clone() for p in twin.parameters()]

    def embed(w: list[Tensor], texts: list[str]) -> Tensor:
        features = twin.preprocess(texts)
        named = dict(zip(names, w, strict=True))
        return functional_call(twin, named, (features,))["sentence_embedding"]

    def share(w: list[Tensor]) -> Tensor:
        anchors, positives = embed(w, TEXTS), embed(w, [text[::-1] for text in TEXTS])
        scores = 20 * cosine_similarity(anchors[:, None], positives[None], dim=-1)
        return cross_entropy(scores, torch.arange(len(TEXTS)))

    g_s, [readings] = sam_step(w, [share], RHO)
    run(sam)
    first = sam.state.log_history[0]
    assert_close(first["loss"], readings.loss, rtol=1e-5, atol=0)
    assert_close(first["sam_sharpness"], readings.sharpness, rtol=1e-3, atol=0)
    expected = {
        n: w_i if g is None else w_i - 0.1 * g for n, w_i, g in zip(names, w, g_s, strict=True)
    }
    step = sum((expected[n] - w_i).norm() ** 2 for n, w_i in zip(names, w, strict=True)) ** 0.5
    actual = dict(sam.model.named_parameters())
    wrong = sum((actual[n].double() - expected[n]).norm() ** 2 for n in names) ** 0.5
    assert wrong < 1e-4 * step


def test_a_classifier_of_the_loss_is_trained_and_not_perturbed(folder):
    plain = run(build(folder, "softmax", max_steps=1, gradient_accumulation_steps=1))
    sam = run(
        build(folder, "softmax", {"sam_rho": RHO}, max_steps=1, gradient_accumulation_steps=1)
    )
    start = weights(build(folder, "softmax").loss)
    head = "classifier.weight"
    assert not torch.equal(weights(sam.loss)[head], start[head])
    assert not torch.equal(weights(sam.loss)[head], weights(plain.loss)[head])
    assert sam.state.log_history[0]["sam_perturbation_norm"] == pytest.approx(RHO, rel=1e-4)

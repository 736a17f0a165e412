"""The objective: value, gradient and Hessian products; and that it leaves everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from curved import Fused, Quadratic, batches, classifier, nothing
from real_models import bert
from reference_sharpness import dense_hessian, flat
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights
from torch import nn
from torch.utils.data import DataLoader

from sam_hf.diagnostics import (
    Objective,
    average_sharpness,
    gradient_noise,
    hessian_trace,
    measure,
    perturbation_budget,
    random_plane,
    scan,
    top_eigenpairs,
    worst_sharpness,
)


def whole_loss(data):
    (batch,) = batches(data, len(data))
    return lambda model: model(**batch)["loss"]


def test_value_and_gradient_are_those_of_one_batch_however_the_examples_are_cut():
    torch.manual_seed(0)
    model, data = Classifier(), examples(10)
    loss = whole_loss(data)(model)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for size in (10, 4, 3, 1):
        objective = Objective(model, batches(data, size))
        assert objective.value() == pytest.approx(loss.item(), rel=1e-14)
        torch.testing.assert_close(flat(objective.gradient()), flat(expected), rtol=1e-12, atol=0)
        assert objective.example_count == 10


@pytest.mark.parametrize("products", ["exact", "differences"])
def test_hessian_products_are_the_columns_of_the_dense_hessian(products):
    model, data = Classifier(), examples(10)
    dense = dense_hessian(model, whole_loss(data))
    objective = Objective(model, batches(data, 4), products=products)
    v = objective.random_vector(torch.Generator().manual_seed(3))
    tolerance = 1e-12 if products == "exact" else 1e-6
    expected = dense @ flat(v)
    actual = flat(objective.hessian_product(v))
    assert (actual - expected).norm() <= tolerance * expected.norm()
    assert objective.products == products


@pytest.mark.parametrize("fails", [False, True])
def test_a_kernel_without_a_second_derivative_is_met_by_differences_and_a_warning(fails):
    objective = Objective(Fused(fails), nothing())
    v = [torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)]
    why = "flash_backward is not implemented" if fails else "part of the backward graph is missing"
    with pytest.warns(UserWarning, match=f"central differences of gradients.*{why}"):
        product = objective.hessian_product(v)
    w = objective.weights[0].detach()
    torch.testing.assert_close(product[0], 6 * w * v[0], rtol=1e-7, atol=1e-8)
    assert objective.products == "differences"
    if fails:
        with pytest.raises(RuntimeError, match="flash_backward"):
            Objective(Fused(fails), nothing(), products="exact").hessian_product(v)


def test_a_linear_loss_has_exact_products_of_zero():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return {"loss": (self.w * 1.7).sum() + 0 * x.sum()}

    objective = Objective(Linear(), nothing())
    assert top_eigenpairs(objective).values == [0.0]
    assert objective.products == "exact"


def test_a_zero_vector_has_a_zero_product():
    objective = Objective(Quadratic(), nothing(), products="differences")
    zeros = [torch.zeros_like(w) for w in objective.weights]
    assert all((x == 0).all() for x in objective.hessian_product(zeros))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_differentiated_twice(attention):
    torch.manual_seed(0)
    model = bert()
    model.set_attn_implementation(attention)
    ids = torch.randint(0, model.config.vocab_size, (3, 6))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}
    exact = Objective(model, [batch], products="exact", params="attention")
    differences = Objective(model, [batch], products="differences", params="attention")
    v = exact.random_vector(torch.Generator().manual_seed(0))
    a, b = flat(exact.hessian_product(v)), flat(differences.hessian_product(v))
    assert (a - b).norm() < 1e-5 * a.norm()


def test_all_measures_leave_the_model_and_the_world_as_they_were():
    model = Classifier(dropout=0.5)
    model.norm = nn.BatchNorm1d(5, dtype=torch.float64)
    forward = model.forward
    model.forward = lambda x, labels=None: forward(model.norm(x), labels)
    model.train()
    model.layer_norm.eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, modes = weights(model), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    loader = DataLoader(examples(8), batch_size=4, shuffle=True)  # it draws from the global state
    objective = Objective(model, loader)
    measure(objective)
    scan(objective, random_plane(objective), [[-1.0, 0.0, 1.0]] * 2, progress=False)
    assert_same_bits(model, before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert all((p.grad == 1).all() for p in model.parameters())


def test_where_memory_is_short_for_exact_products_there_are_differences(monkeypatch):
    objective = classifier()
    v = objective.random_vector(torch.Generator().manual_seed(0))
    expected = flat(classifier(products="differences").hessian_product(v))

    def short(*args):
        raise torch.OutOfMemoryError("no memory is left\nand more")

    monkeypatch.setattr(Objective, "_exact_product", short)
    with pytest.warns(UserWarning, match="exact products failed: no memory is left$"):
        assert torch.equal(flat(objective.hessian_product(v)), expected)
    assert objective.products == "differences"


def test_a_loss_that_is_no_number_has_no_measures():
    """A batch without a target has such a loss, and a gradient of 0."""
    data = batches(examples(8), 4)
    data[0]["labels"] = torch.full((4,), -100)
    with pytest.raises(ValueError, match="the loss at the weights is nan: sharpness is undefined"):
        measure(Objective(Classifier(), data))


def test_the_usual_size_of_a_batch_is_that_of_most():
    data = [*batches(examples(2), 2), *batches(examples(12, seed=1), 4)]
    objective = Objective(Classifier(), data)
    assert (objective.common_batch_size, objective.common_batch_count) == (4, 3)
    assert "gradient_noise" in measure(objective)


def test_gradients_of_a_sparse_embedding_are_those_of_a_dense_one():
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=sparse)
        data = [torch.tensor([0, 1, 1]), torch.tensor([4, 1, 0])]
        objective = Objective(model, data, loss=lambda m, x: m(x).square().mean())
        found.append(gradient_noise(objective))
    assert found[0] == found[1]


@pytest.mark.parametrize("where", [1, 2, 5, 9])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_any_pass_leaves_the_weights_bit_for_bit(where, error):
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls >= where:
            raise error("stop")
        return model(**batch)["loss"]

    for function in (
        worst_sharpness,
        average_sharpness,
        lambda o: scan(o, random_plane(o), [[-1.0, 1.0]] * 2, progress=False),
        lambda o: hessian_trace(o, samples=4),
    ):
        calls, model = 0, Classifier().train()
        before = weights(model)
        objective = Objective(model, batches(examples(4), 4), loss=loss, products="differences")
        with pytest.raises(error):
            function(objective)
            function(objective)
        assert_same_bits(model, before)
        assert model.training


def test_under_accelerates_autocast_the_measures_are_those_in_full_precision():
    torch.manual_seed(0)
    model, data = Classifier(dtype=torch.float32), examples(8, dtype=torch.float32)
    expected = Objective(copy.deepcopy(model), batches(data, 4)).value()
    trainer = sam_trainer(model, data, bf16=True, max_steps=1, use_cpu=True, learning_rate=0.0)
    trainer.train()
    assert "_original_forward" in vars(trainer.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Objective(trainer.model, batches(data, 4)).value() == expected
    assert model(**batches(data, 8)[0])["logits"].dtype == torch.float32


def test_what_cannot_be_measured_is_refused_in_one_line():
    data = batches(examples(4), 4)
    for make, said in (
        (lambda: Objective(Classifier(dtype=torch.bfloat16), data), "weights in torch.bfloat16"),
        (lambda: Objective(Classifier(), []), "batches is empty"),
        (lambda: Objective(Classifier(), [{"x": torch.zeros(0, 5)}]), "batch number 0 has no"),
        (lambda: Objective(Classifier(), data, products="dense"), "products='dense' is not"),
        (lambda: Objective(Classifier(), data, params="nose"), "selects no trainable parameter"),
        (lambda: Objective(Classifier(), [(1, 2)]), "has no examples"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            make()
        assert "\n" not in str(caught.value)
    for batch, said in (
        (
            {"x": torch.zeros(4, 5, dtype=torch.float64)},
            "returned no scalar loss for a batch with the keys .'x'.",
        ),
        ((torch.zeros(4, 5),), "a batch of type tuple is not a mapping: pass loss="),
    ):
        with pytest.raises(ValueError, match=said):
            Objective(Classifier(), [batch]).value()


def test_frozen_weights_and_those_that_are_not_selected_have_no_part():
    model = Classifier()
    model.first.weight.requires_grad_(False)
    objective = Objective(model, batches(examples(4), 4), params="matrices")
    assert objective.names == ["second.weight"]
    assert top_eigenpairs(objective).values[0] < float("inf")
    assert gradient_noise(Objective(model, batches(examples(4), 2))).noise > 0
    assert set(perturbation_budget(classifier())) == {"norms", "biases", "matrices"}


def test_the_fingerprint_tells_weights_and_data_apart():
    marks = {classifier().fingerprint(), classifier(n=9).fingerprint()}
    other = classifier()
    with torch.no_grad():
        other.weights[0][0, 0] += 1e-12
    marks.add(other.fingerprint())
    assert len(marks) == 3 and classifier().fingerprint() in marks


def test_differences_find_the_sharpest_direction_of_a_large_network_in_float32():
    torch.manual_seed(0)
    width = 300  # some 1e5 weights: a step as long as all of them would leave the valley
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                          nn.Linear(width, 5))  # fmt: skip
    x, labels = torch.randn(64, 20), torch.randint(0, 5, (64,))
    with torch.no_grad():
        for p in model.parameters():
            p *= 3

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    values = {}
    for products in ("exact", "differences"):
        objective = Objective(model, [(x, labels)], loss=loss, products=products)
        values[products] = top_eigenpairs(objective, tolerance=1e-2).values[0]
    assert values["differences"] == pytest.approx(values["exact"], rel=0.05)


def test_differences_that_depend_on_their_step_are_told():
    class Kink(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((1,), 1e-9, dtype=torch.float64))

        def forward(self, x):
            return {"loss": self.w.abs().sum() + 0 * x.sum()}

    objective = Objective(Kink(), nothing(), products="differences")
    with pytest.warns(UserWarning, match="when the step is halved"):
        objective.hessian_product([torch.ones(1, dtype=torch.float64)])


def test_modules_that_write_buffers_while_they_are_evaluated_are_put_back():
    class Counts(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x, labels=None):
            self.seen += 1
            self.last = self.seen.clone()
            return super().forward(x, labels)

    model = Counts()
    last = model.last
    measure(Objective(model, batches(examples(8), 4)))
    assert model.seen == 0 and model.last is last and last == 0


def test_exact_products_stay_where_the_differences_are_no_judge():
    class Kinks(nn.Module):
        """Smooth but for kinks, which differences with any step see, and no derivative does."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((4,), 1e-9, dtype=torch.float64))

        def forward(self, x):
            return {"loss": self.w.square().sum() + self.w.abs().sum() + 0 * x.sum()}

    objective = Objective(Kinks(), nothing())
    v = [torch.ones(4, dtype=torch.float64)]
    torch.testing.assert_close(objective.hessian_product(v)[0], 2 * v[0])
    assert objective.products == "exact"

"""The battery: what holds for every method of the registry. A new method needs a row in TWINS."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import Accelerator
from reference_asam import asam_perturbation
from reference_sam import sam_perturbation
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights

from sam_hf import SAMConfig
from sam_hf.backends import Backend
from sam_hf.methods import METHODS
from sam_hf.perturbation import Perturbation, step_size

RHO = 0.7
NAMES = ["layer.weight", "layer.bias", "norm.weight"]

# Each method's perturbation, written from its paper: (w, g, names) -> e, with the default options.
TWINS = {
    "sam": lambda w, g, names: sam_perturbation(g, RHO),
    "asam": lambda w, g, names: asam_perturbation(w, g, RHO, 0.01, [True] * len(w)),
}

every_method = pytest.mark.parametrize("name", METHODS)
every_scope = pytest.mark.parametrize("scope", ["batch", "micro_batch"])


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (4,), (5,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def perturbed(name, w, g, names=NAMES, rho=RHO):
    """e, as the trainer would apply it to parameters with the gradients g."""
    parameters = [torch.nn.Parameter(x.clone()) for x in w]
    for p, grad in zip(parameters, g, strict=True):
        p.grad = grad.clone()
    method, backend = SAMConfig(sam_method=name).build_method(), Backend(parameters, Accelerator())
    before = [p.detach().clone() for p in parameters]
    direction, squared = method.direction(
        names, parameters, backend.gradients(parameters), backend.dot
    )
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    perturbation = Perturbation([p.detach() for p in parameters])
    perturbation.apply(direction, step_size(rho, squared))
    return [p.detach() - b for p, b in zip(parameters, before, strict=True)]


def test_every_method_has_a_twin_written_from_its_paper():
    assert TWINS.keys() == METHODS.keys()


@every_method
def test_the_citation_is_that_of_the_paper_that_the_docstring_names(name):
    citation, docstring = METHODS[name].citation, METHODS[name].__doc__
    entry = dict(re.findall(r"^  (\w+) = \{(.*?)\},?$", citation, re.MULTILINE | re.DOTALL))
    assert entry["url"] in docstring and f"{entry['year']}," in docstring
    title = " ".join(re.sub("[{}]", "", entry["title"]).split())
    assert title in " ".join(docstring.split())
    for author in entry["author"].split(" and "):
        assert author.split(",")[0] in docstring
    assert citation.startswith("@") and citation.count("{") == citation.count("}")


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_perturbation_equals_the_twin(name, dtype):
    w, g = tensors(1), tensors(2)
    expected = TWINS[name](w, g, NAMES)
    actual = perturbed(name, [x.to(dtype) for x in w], [x.to(dtype) for x in g])
    for e, twin in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            e.double(), twin, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6
        )


@every_method
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**16])
def test_the_scale_of_the_gradient_does_not_matter(name, factor):
    w, g = tensors(1), tensors(2)
    for e, scaled in zip(
        perturbed(name, w, g), perturbed(name, w, [x * factor for x in g]), strict=True
    ):
        torch.testing.assert_close(scaled, e, rtol=1e-12, atol=1e-15)


@every_method
def test_the_perturbation_grows_in_proportion_to_rho_and_raises_the_loss_to_first_order(name):
    w, g = tensors(1), tensors(2)
    e, doubled = perturbed(name, w, g), perturbed(name, w, g, rho=2 * RHO)
    for one, two in zip(e, doubled, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=1e-15)
    assert sum((x * y).sum() for x, y in zip(g, e, strict=True)) > 0


@every_method
def test_the_norm_is_that_of_all_parameters_together(name):
    """Cutting a tensor in two pieces changes nothing."""
    w, g = tensors(1), tensors(2)
    whole = perturbed(name, w, g)
    w_cut, g_cut = ([x[0][:1], x[0][1:], x[1], x[2]] for x in (w, g))
    pieces = perturbed(name, w_cut, g_cut, names=[NAMES[0], NAMES[0], *NAMES[1:]])
    joined = [torch.cat(pieces[:2]), *pieces[2:]]
    for a, b in zip(joined, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@every_method
@pytest.mark.parametrize("bad", [0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("waits", [False, True])
def test_a_zero_or_non_finite_gradient_perturbs_nothing(name, bad, dtype, waits, monkeypatch):
    # `waits`: the path of a device whose numbers cannot be read without waiting for it
    monkeypatch.setattr("sam_hf.perturbation._reading_is_free", lambda number: not waits)
    w, g = tensors(1, dtype), tensors(2, dtype)
    if bad == 0.0:
        g = [torch.zeros_like(x) for x in g]
    else:
        g[1][2] = bad
    assert all(torch.equal(e, torch.zeros_like(e)) for e in perturbed(name, w, g))


@every_method
def test_a_device_that_must_not_be_waited_for_gets_the_same_perturbation(name, monkeypatch):
    w, g = tensors(1), tensors(2)
    expected = perturbed(name, w, g)
    monkeypatch.setattr("sam_hf.perturbation._reading_is_free", lambda number: False)
    for a, b in zip(perturbed(name, w, g), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_small_gradients_get_the_perturbation_of_the_twin(name, dtype):
    # T² g is far below what fp16 can hold
    w = [0.02 * x for x in tensors(1)]
    g = [(1e-4 * x).to(dtype) for x in tensors(2)]
    expected = TWINS[name]([x.to(dtype).double() for x in w], [x.double() for x in g], NAMES)
    actual = perturbed(name, [x.to(dtype) for x in w], g)
    for e, twin in zip(actual, expected, strict=True):
        # what rounding w + e to the narrow type may cost
        torch.testing.assert_close(e.double(), twin, rtol=0.01, atol=0.1 * torch.finfo(dtype).eps)


@every_method
def test_the_ascent_gradient_comes_back_from_the_perturbation(name):
    w, g = tensors(1), tensors(2)
    e = perturbed(name, w, g)
    method = SAMConfig(sam_method=name).build_method()
    back = method.ascent_gradient(NAMES, w, e)
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (back, g))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - 1e-12


@every_method
@every_scope
def test_a_training_run_never_shows_perturbed_weights(name, scope):
    model, data = Classifier(dropout=0.3), examples(16)
    trainer = sam_trainer(
        model,
        data,
        sam={"sam_method": name, "sam_scope": scope, "sam_rho": RHO},
        gradient_accumulation_steps=2,
        learning_rate=0.0,
    )
    before = weights(model)
    trainer.train()
    assert_same_bits(model, before)
    assert trainer.state.log_history[0]["sam_sharpness"] != 0


@every_method
@every_scope
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(name, scope, tmp_path):
    def run(resume=None, **args):
        torch.manual_seed(3)
        trainer = sam_trainer(
            Classifier(dropout=0.3),
            examples(40),
            sam={"sam_method": name, "sam_scope": scope, "sam_rho": RHO, "sam_interval": 2},
            optim="adamw_torch",
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=6,
            output_dir=str(tmp_path),
            save_strategy="steps",
            save_steps=3,
            train_sampling_strategy="random",
            **args,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, torch.get_rng_state()

    straight, straight_rng = run()
    resumed, resumed_rng = run(resume=str(tmp_path / "checkpoint-3"))
    assert_same_bits(resumed.model, weights(straight.model))
    assert torch.equal(straight_rng, resumed_rng)

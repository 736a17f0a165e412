"""An ascent leaves out the gradients of weights that it does not need."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from method_twins import METHODS, trained
from tiny import CHECKPOINTING, CLASSES, FEATURES, Classifier, examples, sentences, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from twin_runs import assert_same_run

from sam_hf.distributed import DDPLayout
from sam_hf.distributed.graph import reaches_its_parameters


def count_gradients(model: nn.Module) -> dict[str, int]:
    counts = dict.fromkeys(dict(model.named_parameters()), 0)

    def count(name: str) -> Any:
        def hook(_: Tensor) -> None:
            counts[name] += 1

        return hook

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(count(name))
    return counts


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("method", ["sam", "asam", "vasso", "esam"])
def test_an_ascent_computes_the_gradients_that_it_needs_alone_and_nothing_else_changes(
    scope, method, monkeypatch
):
    sam = METHODS.get(method, {"sam_method": method})
    sam = sam | {"sam_scope": scope, "sam_params": "all" if method == "esam" else "norms"}
    runs, updates, steps = [], 4, 2
    for is_partial in (True, False):
        monkeypatch.setattr(DDPLayout, "can_take_some_gradients", is_partial)
        set_seed(0)
        model = Classifier(dropout=0.2)
        counts = count_gradients(model)
        trainer, _, passes = trained(
            model, examples(32), sam, gradient_accumulation_steps=steps, max_steps=updates
        )
        runs.append(trainer)
        for name, count in counts.items():
            moved = sum(name in update[-1] for update in passes.selected)
            assert count == steps * (updates + (moved if is_partial else updates)), name
    assert_same_run(*runs)


@pytest.mark.parametrize("sam", [METHODS["gsam"], {"sam_trigger": "gradient_norm"}])
def test_where_the_optimizer_may_get_g_all_of_it_is_computed(sam):
    model = Classifier()
    counts = count_gradients(model)
    trained(model, examples(16), sam | {"sam_params": "norms"}, max_steps=1)
    assert set(counts.values()) == {2}


@pytest.mark.parametrize("by", ["arguments", "model"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_reentrant_checkpointing_all_gradients_are_computed(by, use_reentrant):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 11}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    start = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))
    options, ends = {"use_reentrant": use_reentrant}, []
    for is_checkpointed in (False, True):
        model, args = copy.deepcopy(start), {}
        if is_checkpointed and by == "model":
            getattr(model, f"{CHECKPOINTING}_enable")(options)
            model.enable_input_require_grads()
        elif is_checkpointed:
            args = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": options}
        counts = count_gradients(model)
        sam = {"sam_params": "norms"}
        trained(model, sentences(12), sam, name="input_ids", max_steps=3, **args)
        is_whole = is_checkpointed and use_reentrant
        ends.append(weights(model))
        for name, w in ends[-1].items():
            assert (ends[0][name] - w).abs().max() < 1e-6, name
        for name, count in counts.items():
            assert count == (6 if is_whole or "norm" in name else 3), name


class Hidden(nn.Module):
    """A classifier whose norm takes its gradient from a backward pass within the backward pass."""

    def __init__(self, by: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 6, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.second = nn.Linear(6, CLASSES, dtype=torch.float64)
        self.last = nn.LayerNorm(CLASSES, dtype=torch.float64)
        self.by = by

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.by == "checkpoint":
            hidden = checkpoint(self.body, x.requires_grad_(), use_reentrant=True)
        elif self.by == "hook" and torch.is_grad_enabled():
            hidden = self.body(x)
            cut = hidden.detach().requires_grad_()
            loss = cross_entropy(self.last(self.second(cut)), labels)
            (of_cut,) = torch.autograd.grad(loss, cut, retain_graph=True)
            loss.register_hook(lambda g: hidden.backward(of_cut * g))
            return {"loss": loss}
        else:
            hidden = self.body(x)
        return {"loss": cross_entropy(self.last(self.second(hidden)), labels)}


@pytest.mark.parametrize("sam", [{"sam_params": "norms"}, {"sam_method": "esam"}])
@pytest.mark.parametrize("by", ["checkpoint", "hook"])
def test_gradients_that_come_from_a_hidden_part_of_the_graph_are_not_lost(by, sam):
    ends = []
    for how in (None, by):
        model = Hidden(how)
        trained(model, examples(16), {"sam_rho": 0.5, **sam}, max_steps=3)
        ends.append(weights(model))
    for name, expected in ends[0].items():
        assert_close(ends[1][name], expected, rtol=1e-12, atol=1e-14)


def test_what_reaches_its_parameters_is_seen_in_the_graph():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    assert reaches_its_parameters(model(x).sum())
    assert reaches_its_parameters(checkpoint(model, x, use_reentrant=False).sum())
    assert not reaches_its_parameters(
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).sum()
    )
    assert not reaches_its_parameters(model(x).detach().requires_grad_().sum())
    compiled = torch.compile(model, backend="aot_eager")
    assert reaches_its_parameters(compiled(x).sum())

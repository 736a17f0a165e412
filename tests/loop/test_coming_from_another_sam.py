"""The loops of docs/guides/coming_from_another_sam.md run and give the numbers of the page."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from reference_asam import asam_step
from reference_sam import sam_step, value_and_grad
from tiny import Classifier, examples, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from sam_hf import SAM, SAMConfig

PAGE = Path(__file__).parents[2] / "docs/guides/coming_from_another_sam.md"
BLOCKS = dict(re.findall(r"```python\n# after: (.+)\n((?:(?!```)[\s\S])+)```", PAGE.read_text()))
UPDATES = 20


class Logits(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)["logits"]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return Logits()


def loader() -> list[tuple[Tensor, Tensor]]:
    rows = examples(6 * UPDATES).rows
    batches = (default_collate(rows[i : i + 6]) for i in range(0, len(rows), 6))
    return [(batch["x"], batch["labels"]) for batch in batches]


def run_block(name: str) -> nn.Module:
    names = {"torch": torch, "model": new_model(), "loader": loader(), "loss_fn": cross_entropy}
    exec(BLOCKS[name], names)
    return names["model"]


def loss_of(model, names, x, y, parts, w: list[Tensor]) -> Tensor:
    logits = functional_call(model, dict(zip(names, w, strict=True)), (x,))
    return cross_entropy(logits, y) / parts


def by_the_twin(step, make_optimizer, interval: int = 1, parts: int = 1) -> nn.Module:
    """The optimizer's steps with the g_s of a float64 twin."""
    model = new_model()
    optimizer = make_optimizer(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    for update, (x, y) in enumerate(loader()):
        pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
        losses = [functools.partial(loss_of, model, names, a, b, parts) for a, b in pairs]
        w = [p.detach().clone() for p in model.parameters()]
        g_s = value_and_grad(losses[0], w)[1] if update % interval else step(w, losses)[0]
        for p, g in zip(model.parameters(), g_s, strict=True):
            p.grad = g
        optimizer.step()
    return model


SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)
PLAIN_SAM = functools.partial(sam_step, rho=0.05)
EXPECTED = {
    "davda54/sam": (PLAIN_SAM, SGD),
    "davda54/sam, adaptive": (functools.partial(asam_step, rho=2.0, eta=0.0), SGD),
    "pytorch-optimizer": (PLAIN_SAM, ADAMW),
    "Composer": (PLAIN_SAM, SGD, 2),
    "Keras": (
        functools.partial(sam_step, rho=0.05, scope="micro_batch"),
        functools.partial(torch.optim.SGD, lr=0.1),
        1,
        2,
    ),
}


def test_every_loop_of_the_page_is_tested():
    assert BLOCKS.keys() == {*EXPECTED, "Lightning"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_loop_of_the_page_gives_the_weights_of_the_paper(name):
    expected = weights(by_the_twin(*EXPECTED[name]))
    torch.testing.assert_close(weights(run_block(name)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("adaptive", [False, True])
def test_over_20_updates_the_weights_are_those_of_pytorch_optimizer(adaptive):
    """Their norm is summed in fp32: the two differ by its rounding."""
    theirs = pytest.importorskip("pytorch_optimizer")
    other, model, rho = new_model(), new_model(), 0.7 if adaptive else 0.05
    optimizer = theirs.SAM(
        other.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.1, momentum=0.9
    )
    ours = SGD(model.parameters())
    config = SAMConfig(sam_rho=rho, **({"sam_method": "asam", "sam_eta": 0.0} if adaptive else {}))
    sam = SAM(model, ours, config)
    for x, y in loader():

        def closure():
            loss = cross_entropy(other(x), y)  # noqa: B023
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
        sam.backward(lambda: cross_entropy(model(x), y))  # noqa: B023
        ours.step()
        ours.zero_grad()
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=1e-6)
    moved = max(
        (w - v).abs().max()
        for w, v in zip(model.parameters(), new_model().parameters(), strict=True)
    )
    assert moved > 0.01

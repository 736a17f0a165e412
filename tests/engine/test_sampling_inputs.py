"""Trainers and inputs of which the ascent can take a part, and those of which it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_twins import trained
from sampled import HALF, WholeBatches, rows_taken
from tiny import Classifier, examples, sam_trainer
from torch import Tensor
from torch.utils.data import default_collate
from transformers import Trainer

from sam_hf import SAMTrainer, with_sam
from sam_hf.engine.subset import select_examples


class OwnStep(WholeBatches):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class OwnInputs(WholeBatches):
    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize(
    ("trainer_class", "steps", "scope", "why"),
    [
        (WholeBatches, 1, "batch", "one micro-batch: accumulate several"),
        (WholeBatches, 4, "micro_batch", "set sam_scope='batch'"),
        (OwnStep, 4, "batch", "its own training_step or _prepare_inputs"),
        (OwnInputs, 4, "batch", "its own training_step or _prepare_inputs"),
    ],
)
def test_a_trainer_of_which_no_part_can_be_taken_is_refused_in_one_line(
    trainer_class, steps, scope, why
):
    def build(**sam: Any) -> Any:
        return sam_trainer(
            Classifier(),
            examples(8),
            with_sam(trainer_class),
            sam={"sam_rho": 0.05, "sam_scope": scope, **sam},
            gradient_accumulation_steps=steps,
        )

    with pytest.raises(ValueError, match=r"^sam_ascent_fraction=0\.5 is not allowed with") as e:
        build(**HALF)
    message = str(e.value)
    assert why in message and "\n" not in message
    assert "override sam_select_examples, or set sam_ascent_fraction=1.0" in message
    build()
    build(**HALF, sam_rho=0.0)


class _OwnWay:
    """Its examples share a tensor, and it says how to take some."""

    asked: tuple = ()

    def sam_select_examples(self, inputs, indices):
        self.asked += (indices.tolist(),)
        return {name: value[indices] for name, value in inputs.items() if name != "scale"} | {
            "scale": inputs["scale"]
        }

    def compute_loss(self, model, inputs, *args, **kwargs):
        scale = inputs.pop("scale")
        inputs["x"] = inputs["x"] * scale[:2].prod()
        return super().compute_loss(model, inputs, *args, **kwargs)


class OwnWay(_OwnWay, Trainer): ...


class SAMOwnWay(_OwnWay, SAMTrainer): ...


@pytest.mark.parametrize("trainer_class", [SAMOwnWay, with_sam(OwnWay)])
def test_a_trainers_own_way_to_take_examples_is_used(trainer_class):
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return default_collate(rows) | {"scale": torch.ones(9, dtype=torch.float64)}

    trainer, _, passes = trained(
        Classifier(),
        examples(24),
        HALF,
        trainer_class,
        {"data_collator": collate},
        max_steps=3,
    )
    assert [len(x) for update in passes.inputs for x in update] == [2, 4] * 3
    assert len(trainer.asked) == 3
    for indices, update in zip(trainer.asked, rows_taken(passes, examples(24)), strict=True):
        assert [update[1][i] for i in indices] == update[0]
    # Without it, a tensor of another length is no column.
    with pytest.raises(ValueError, match=r"input 'scale' has 9 rows for 4 .*sam_select_examples"):
        trained(Classifier(), examples(24), HALF, kwargs={"data_collator": collate})


def test_inputs_that_have_no_rows_are_refused_in_one_line_and_others_are_cut():
    indices = torch.tensor([0, 2])
    for inputs in ([torch.ones(3)], {"text": ["a", "b"]}, {"x": torch.ones(())}):
        with pytest.raises(ValueError, match=r"sam_ascent_fraction: .*sam_select_examples") as e:
            select_examples(inputs, indices)
        assert "\n" not in str(e.value)
    x = torch.arange(6).reshape(3, 2)
    with pytest.raises(ValueError, match="the input 'text' has 2 rows for 3 examples") as e:
        select_examples({"x": x, "text": ["a", "b"]}, indices)
    assert "\n" not in str(e.value) and "sam_ascent_fraction=1.0" in str(e.value)
    inputs = {"x": x, "text": ["a", "b", "c"], "flag": True, "nothing": None, "t": torch.ones(())}
    chosen = select_examples(inputs, indices)
    assert chosen["x"].tolist() == [[0, 1], [4, 5]] and chosen["text"] == ["a", "c"]
    assert chosen["flag"] is True and chosen["nothing"] is None and chosen["t"] is inputs["t"]
    assert inputs["x"] is x and len(inputs["text"]) == 3

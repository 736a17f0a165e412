"""What cannot be trained with SAM raises, with the reason and the way out, before it does harm."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from sam_hf import SAMTrainer, with_sam
from sam_hf.distributed import validation

LEFT_OFF = pytest.mark.parametrize("rho", [0.0, 0.1], ids=["off", "on"])


class Lomo(torch.optim.SGD):
    """Named as the optimizer that steps inside backward."""


class Sharded(SAMTrainer):
    """Says of its accelerator what the test wants."""

    says: Callable[[Any], None]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        type(self).says(self)


def with_accelerator(says: Callable[[Any], None]) -> type:
    return type("Sharded", (Sharded,), {"says": staticmethod(says)})


def parallel(**sizes: bool) -> Callable[[Any], None]:
    """With `Accelerator.parallelism_config` set: a real one wants several processes."""
    config = {"cp_enabled": False, "sp_enabled": False, "tp_enabled": False, "sp_backend": "none"}

    def say(trainer: Any) -> None:
        trainer.accelerator = Proxy(
            trainer.accelerator, parallelism_config=SimpleNamespace(**{**config, **sizes})
        )

    return say


class Proxy:
    """An accelerator with some attributes replaced."""

    def __init__(self, inner: Accelerator, **replaced: Any) -> None:
        self.__dict__.update(replaced, inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def several_processes(trainer: Any) -> None:
    trainer.accelerator = Proxy(
        trainer.accelerator, num_processes=2, distributed_type=DistributedType.XLA
    )


def deepspeed(stage: int) -> Callable[[Any], None]:
    def say(trainer: Any) -> None:
        trainer.is_deepspeed_enabled = True
        plugin = SimpleNamespace(zero_stage=stage)
        trainer.accelerator = Proxy(
            trainer.accelerator, state=SimpleNamespace(deepspeed_plugin=plugin)
        )

    return say


def fsdp1(trainer: Any) -> None:
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(fsdp_version=1)
    trainer.accelerator = Proxy(trainer.accelerator, state=SimpleNamespace(fsdp_plugin=plugin))


LAYOUTS = {
    "ZeRO-3": (deepspeed(3), "ZeRO stage 3.*zero_stage 0, 1 or 2.*FSDP2"),
    "FSDP1": (fsdp1, "fsdp_version=1.*Set fsdp_version=2"),
    "context parallelism": (parallel(cp_enabled=True), "split the inputs.*Set cp_size=1"),
    "sequence parallelism": (parallel(sp_enabled=True), "split the inputs.*sp_size=1"),
    "processes": (several_processes, "layout XLA.*2 processes.*Use DDP or FSDP2"),
}


def build(rho: float, **kwargs: Any) -> Any:
    """Build a trainer; with SAM on, it must raise the error whose pattern is in `match`."""
    match = kwargs.pop("match")
    model, data = kwargs.pop("model", None) or Classifier(), examples(8)
    if rho == 0:
        return sam_trainer(model, data, sam={"sam_rho": 0.0}, **kwargs)
    with pytest.raises(ValueError, match=f"(?s){match}") as error:
        sam_trainer(model, data, sam={"sam_rho": rho}, **kwargs)
    assert "sam_rho=0" in str(error.value) or "sam_params" in str(error.value)
    return None


# --- At construction ------------------------------------------------------------------------------


@LEFT_OFF
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_cannot_work_raises_at_construction_and_is_let_pass_without_sam(layout, rho):
    says, match = LAYOUTS[layout]
    build(rho, trainer_class=with_accelerator(says), match=match)


@LEFT_OFF
@pytest.mark.parametrize("by", ["options", "launcher"])
def test_fsdp_that_accelerate_has_dropped_raises_at_construction(by, rho, monkeypatch):
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")

    def says(trainer: Any) -> None:
        trainer.accelerator = Proxy(trainer.accelerator, num_processes=2)
        if by == "options":  # with one process, the Trainer refuses the real one
            trainer.args.fsdp_plugin_args = {"fsdp_version": 2}

    match = (
        "FSDP was requested.*does not shard on cpu: these 2 processes.*with DDP.*Leave `fsdp` out"
    )
    build(rho, trainer_class=with_accelerator(says), match=match)


def test_reentrant_checkpointing_beside_deepspeed_raises_at_construction():
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    model = Classifier()
    model.gradient_checkpointing_enable = lambda *args, **kwargs: None
    says = with_accelerator(deepspeed(2))
    build(0.1, model=model, trainer_class=says, match="use_reentrant=True", **checkpointing)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("sam", "match"),
    [
        ({"sam_method": "msam", "sam_rho": 1}, "sam_method='msam' perturbs along the optimizer's"),
        ({"sam_method": "gsam"}, "sam_method='gsam' combines the gradients"),
        ({"sam_method": "looksam"}, "sam_method='looksam' combines the gradients"),
        ({"sam_method": "wsam"}, "sam_method='wsam' combines the gradients"),
        ({"sam_method": "bar", "sam_rho": 1}, "sam_method='bar' acts at the optimizer step"),
        ({"sam_method": "bilora", "sam_rho": 1}, "sam_method='bilora' acts at the optimizer step"),
        ({"sam_trigger": "gradient_norm"}, "sam_trigger steps with the gradient of the ascent"),
    ],
)
def test_a_method_from_which_deepspeed_hides_what_it_needs_raises_at_construction(
    sam, match, stage
):
    trainer_class = with_accelerator(deepspeed(stage))
    with pytest.raises(ValueError, match=f"{match}.*Use DDP or FSDP2.*or another method"):
        sam_trainer(Classifier(), examples(8), trainer_class, sam={"sam_rho": 0.1, **sam})


def fsdp2(trainer: Any) -> None:
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(fsdp_version=2)
    trainer.accelerator = Proxy(trainer.accelerator, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize("how", ["fsdp", "loaded"])
@pytest.mark.parametrize("method", ["bar", "bilora"])
def test_a_method_that_needs_whole_adapters_raises_at_construction_where_they_are_sharded(
    method, how
):
    model, trainer_class = Classifier(), SAMTrainer
    if how == "fsdp":
        trainer_class = with_accelerator(fsdp2)
    else:
        model.is_distributed_loading_by_transformers = True
        model.config = PreTrainedConfig(distributed_config=SimpleNamespace(tp_size=2))
    match = f"sam_method='{method}' needs whole adapters.*with DDP.*sam_rho=0"
    with pytest.raises(ValueError, match=match):
        sam_trainer(model, examples(8), trainer_class, sam={"sam_rho": 0.1, "sam_method": method})


@LEFT_OFF
def test_sagemaker_model_parallelism_raises_at_construction(rho, monkeypatch):
    monkeypatch.setattr(validation, "is_sagemaker_mp_enabled", lambda: True)
    build(rho, match="SageMaker.*without compute_loss.*Train without it")


@LEFT_OFF
@pytest.mark.parametrize(
    "name",
    [
        "lomo",
        "adalomo",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "apollo_adamw_layerwise",
    ],
)
def test_an_optim_that_steps_inside_backward_raises_at_construction(name, rho):
    build(rho, optim=name, match=f"optim='{name}'.*inside backward.*Choose an optim.*adamw_torch")


@LEFT_OFF
@pytest.mark.parametrize("kind", [Lomo, LayerWiseDummyOptimizer])
def test_an_optimizer_object_that_steps_inside_backward_raises_at_construction(kind, rho):
    model = Classifier()
    optimizer = kind(model.parameters(), lr=0.1) if kind is Lomo else kind({})
    kwargs = {"optimizers": (optimizer, None)}
    build(rho, model=model, trainer_kwargs=kwargs, match=f"{kind.__name__}.*inside backward")


def test_the_error_for_an_optim_without_an_optimizer_yet_does_not_name_nonetype():
    with pytest.raises(ValueError) as error:
        sam_trainer(Classifier(), examples(4), optim="lomo")
    assert "NoneType" not in str(error.value)


class SparseTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.head = nn.Linear(3, 5)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.head(self.table(ids)), ids)}


@LEFT_OFF
def test_a_sparse_embedding_that_would_be_perturbed_raises_at_construction(rho):
    build(rho, model=SparseTokens(), match="table.weight.*sparse=False.*sam_rho=0")


@pytest.mark.parametrize("how", ["left out", "frozen"])
def test_a_sparse_embedding_that_is_not_perturbed_is_no_reason_to_raise(how):
    model = SparseTokens()
    model.table.weight.requires_grad_(how != "frozen")
    sam_trainer(model, examples(4), sam={} if how == "frozen" else {"sam_params": "head"})


# --- When training begins -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["optimizer_cls_and_kwargs", "create_optimizer"])
def test_an_optimizer_that_is_made_later_and_steps_inside_backward_raises_before_it_steps(how):
    class Late(SAMTrainer):
        def create_optimizer(self, model=None):
            if how == "create_optimizer":
                self.optimizer = Lomo(self.model.parameters(), lr=0.1)
            return super().create_optimizer(model)

    kwargs = {} if how == "create_optimizer" else {how: (Lomo, {"lr": 0.1})}
    model = Classifier()
    before = weights(model)
    with pytest.raises(ValueError, match=r"Lomo.*inside backward"):
        sam_trainer(model, examples(8), Late, trainer_kwargs=kwargs).train()
    assert_same_bits(model, before)


def test_a_hook_that_consumes_the_gradients_inside_backward_raises_in_the_first_update():
    model = Classifier()
    before = weights(model)

    def consume(p: Tensor) -> None:
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(consume)
    with pytest.raises(RuntimeError, match=r"No parameter has a gradient.*optim.*sam_rho=0"):
        sam_trainer(model, examples(8)).train()
    assert_same_bits(model, before)


class NoComputeLoss(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs)["loss"]
        loss.backward()
        return loss.detach()


class NoSuper(SAMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return NoComputeLoss.training_step(self, model, inputs, num_items_in_batch)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("trainer_class", "match"),
    [
        (with_sam(NoComputeLoss), "never called compute_loss.*Compute the loss in compute_loss"),
        (NoSuper, "NoSuper updates the weights without the training_step of SAMTrainerMixin"),
    ],
)
def test_a_training_step_that_passes_sam_by_raises_before_the_first_optimizer_step(
    trainer_class, match, accumulation
):
    def run(rho: float, model: nn.Module) -> None:
        sam_trainer(
            model,
            examples(16),
            trainer_class,
            sam={"sam_rho": rho},
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        ).train()

    model = Classifier()
    before = weights(model)
    with pytest.raises(RuntimeError, match=match) as error:
        run(0.1, model)
    assert "sam_rho=0" in str(error.value)
    assert_same_bits(model, before)
    run(0.0, model)
    assert not torch.equal(model.first.weight, before["first.weight"])


@LEFT_OFF
@pytest.mark.parametrize("name", ["ep_size", "pp_size"])
def test_a_model_loaded_in_a_layout_of_unknown_shards_raises_at_construction(name, rho):
    model = Classifier()
    model.is_distributed_loading_by_transformers = True
    model.config = PreTrainedConfig(distributed_config=SimpleNamespace(**{name: 2}))
    build(rho, model=model, match=f"{name}=2 in distributed_config.*Set {name}=1")

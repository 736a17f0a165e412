"""Whole runs of the methods, worked out in float64 by the papers' twins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference_esam import esam_perturbation
from reference_friendly_sam import friendly_sam_step
from reference_gsam import gsam_step
from reference_looksam import looksam_step
from reference_msam import msam_gradient
from reference_optimizers import adamw_step, clip_by_global_norm, sgd_step
from reference_sam import Gradient, Loss, add, sam_perturbation, sam_step, value_and_grad
from reference_vasso import vasso_step
from reference_wsam import gradient_and_sharpness, wsam_coupled
from tiny import Spy, sam_trainer
from torch import Tensor, nn
from transformers import TrainerCallback

from sam_hf import SAMTrainer

RHO = 0.3


def _with(method: str, **args: Any) -> dict[str, Any]:
    return {"sam_method": method, "sam_method_args": args}


# Options that are far from the defaults, and from where a method is SAM.
METHODS: dict[str, dict[str, Any]] = {
    "gsam": _with("gsam", alpha=0.4),
    "looksam": _with("looksam", alpha=0.8, k=3),
    "wsam-coupled": _with("wsam", gamma=0.75, decoupled=False),
    "wsam-decoupled": _with("wsam", gamma=0.75),
    "friendly_sam": _with("friendly_sam", sigma=0.8, ema_decay=0.6),
    "vasso": _with("vasso", theta=0.4),
    "msam": {"sam_method": "msam"},
    "esam": _with("esam", beta=0.5),
}
STEPS = {"sgd": sgd_step, "adamw": adamw_step}


class TwinRun:
    """The updates of one run. It has weights, and states of the method and the optimizer.

    Args:
        model: as it begins.
        sam: the options of SAM. What the method needs must be among them.
        optimizer: of `STEPS`; `options` are its own.
        rates: the learning rates of the parameters by name, or one for all.
        processes: each has a state of its own in scope `micro_batch`, and takes its turn.
    """

    def __init__(
        self,
        model: nn.Module,
        sam: dict[str, Any],
        optimizer: str = "sgd",
        rates: float | dict[str, float] = 0.1,
        clip: float = 0.0,
        processes: int = 1,
        **options: Any,
    ) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names, self.w = list(trained), [p.detach().clone() for p in trained.values()]
        self.sam = {"sam_rho": RHO, "sam_scope": "batch", "sam_params": ""} | sam
        self.method_args = self.sam.get("sam_method_args", {})
        self.clip, self.step, self.options = clip, STEPS[optimizer], options
        self.rates = rates if isinstance(rates, dict) else dict.fromkeys(self.names, rates)
        self.kept: list[dict[str, Any]] = [{} for _ in self.names]  # by the optimizer
        self.states: list[dict[str, Any]] = [{} for _ in range(processes)]
        self.t = 0

    @property
    def perturbed(self) -> list[bool]:
        return [bool(re.search(self.sam["sam_params"], name)) for name in self.names]

    @property
    def chosen(self) -> list[str]:
        return [name for name, flag in zip(self.names, self.perturbed, strict=True) if flag]

    def losses(self, shares: Sequence[Callable[[dict[str, Tensor]], Tensor]]) -> list[Loss]:
        """Functions of a list of weights, from those of weights by name."""
        return [lambda w, f=f: f(dict(zip(self.names, w, strict=True))) for f in shares]

    def update(
        self,
        shares: Sequence[Any],
        rho: float | None = None,
        is_plain: bool = False,
        selected: Sequence[str] | None = None,
        ascent: Sequence[Any] | None = None,
        schedule: float = 1.0,
    ) -> None:
        """Make an update.

        Args:
            shares: the parts of the loss, functions of the weights by name.
            is_plain: without any perturbation, and without a trace in the method's state.
            selected: ESAM's choice.
            ascent: the parts of another loss for the ascent.
            schedule: what the learning rates are multiplied by.
        """
        losses = self.losses(shares)
        rho = self.sam["sam_rho"] if rho is None else rho
        is_batch = self.sam["sam_scope"] == "batch" or is_plain
        scopes = [losses] if is_batch else [[loss] for loss in losses]
        total: Gradient = [None] * len(self.w)
        later: Gradient = [None] * len(self.w)
        for i, some in enumerate(scopes):
            place = i % len(self.states)
            if is_plain:
                g = value_and_grad(lambda w, some=some: sum(L(w) for L in some), self.w)[1]
            elif ascent is not None:
                part = self.losses(ascent if is_batch else [ascent[i]])
                g = self.on_a_part(part, some, rho)
            else:
                g, self.states[place], later = self.gradient(
                    some, self.states[place], rho, selected
                )
            total = [add(a, b) for a, b in zip(total, g, strict=True)]
        if self.clip:
            total, _ = clip_by_global_norm(total, self.clip)
        gamma = self.method_args.get("gamma", 0)
        weight = gamma / (1 - gamma)
        for i, name in enumerate(self.names):
            rate = self.rates[name] * schedule
            [w], self.kept[i] = self.step(
                [self.w[i]], [total[i]], self.kept[i], rate, **self.options
            )
            self.w[i] = w if later[i] is None else w - rate * weight * later[i]
        self.t += 1

    def skip(self, shares: Sequence[Any]) -> None:
        """Make an update whose optimizer step is skipped, since g_s is not finite."""
        losses = self.losses(shares)
        if self.sam["sam_method"] in ("friendly_sam", "vasso"):  # whose state is made of g
            _, self.states[0], _ = self.gradient(losses, self.states[0], self.sam["sam_rho"], None)
        self.t += 1

    def gradient(
        self,
        losses: list[Loss],
        state: dict[str, Any],
        rho: float,
        selected: Sequence[str] | None,
    ) -> tuple[Gradient, dict[str, Any], Gradient]:
        """What the optimizer gets, the new state, and what is taken from the weights later."""
        args, w, some = self.method_args, self.w, {"perturbed": self.perturbed}
        nothing: Gradient = [None] * len(w)
        match self.sam["sam_method"]:
            case "sam":
                return sam_step(w, losses, rho, **some)[0], state, nothing
            case "gsam":
                return gsam_step(w, losses, rho, args["alpha"], **some)[0], state, nothing
            case "looksam":
                options = (args["alpha"], args["k"], self.t, state)
                return *looksam_step(w, losses, rho, *options, **some), nothing
            case "wsam" if args.get("decoupled", True):
                g, later = gradient_and_sharpness(w, losses, rho, self.perturbed)
                return g, state, later
            case "wsam":
                return wsam_coupled(w, losses, rho, args["gamma"], **some), state, nothing
            case "friendly_sam":
                options = (args["sigma"], args["ema_decay"], state)
                return *friendly_sam_step(w, losses, rho, *options, **some), nothing
            case "vasso":
                return *vasso_step(w, losses, rho, args["theta"], state, **some), nothing
            case "msam":
                pairs = zip(self.momentum(), self.perturbed, strict=True)
                v = [m if flag else None for m, flag in pairs]
                return msam_gradient(w, v, losses, rho), state, nothing
            case "esam":
                assert selected is not None

                def total(w: list[Tensor]) -> Tensor:
                    return sum(loss(w) for loss in losses)

                chosen = [name in selected for name in self.names]
                g = value_and_grad(total, w)[1]
                e = esam_perturbation(g, rho, args["beta"], chosen, norm_over="selected")
                return value_and_grad(total, moved(w, e))[1], state, nothing
        raise ValueError(self.sam["sam_method"])

    def momentum(self) -> Gradient:
        if self.step is sgd_step:
            return [kept["b"][0] if kept else None for kept in self.kept]
        return [kept["moments"][0][1] if kept else None for kept in self.kept]

    def on_a_part(self, ascent: list[Loss], losses: list[Loss], rho: float) -> Gradient:
        """SAM's g_s, where the ascent was made on another loss."""
        g = value_and_grad(lambda w: sum(L(w) for L in ascent), self.w)[1]
        e = sam_perturbation(
            [a if flag else None for a, flag in zip(g, self.perturbed, strict=True)], rho
        )
        return value_and_grad(lambda w: sum(L(w) for L in losses), moved(self.w, e))[1]

    def squared_norm(self, shares: Sequence[Any]) -> float:
        """|g|² of the perturbed parameters."""
        losses = self.losses(shares)
        g = value_and_grad(lambda w: sum(L(w) for L in losses), self.w)[1]
        pairs = zip(g, self.perturbed, strict=True)
        return sum(float(a.square().sum()) for a, flag in pairs if flag)

    def assert_equals(self, actual: dict[str, Tensor], tolerance: float = 1e-10) -> None:
        for name, expected in zip(self.names, self.w, strict=True):
            assert (actual[name] - expected).abs().max() < tolerance, name


def moved(w: list[Tensor], e: Gradient) -> list[Tensor]:
    return [a if b is None else a + b for a, b in zip(w, e, strict=True)]


def windows(rows: list[Any], size: int, steps: int, updates: int = 7) -> list[list[Any]]:
    """The micro-batches of each update. An epoch may end with a short one."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    epoch = [batches[i : i + steps] for i in range(0, len(batches), steps)]
    return [epoch[update % len(epoch)] for update in range(updates)]


class Passes(TrainerCallback):
    """Looks at each forward pass of the training: its update, its inputs, and where its w is."""

    def __init__(self, model: nn.Module, name: str = "x") -> None:
        self.name, self.update = name, 0
        self.inputs: list[list[Tensor]] = []  # of each update
        self.selected: list[list[list[str]]] = []  # the parameters that were not at w
        self.w: dict[str, Tensor] = {}
        self.hook = model.register_forward_pre_hook(self.look, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.w = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.inputs.append([])
        self.selected.append([])

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.hook.remove()  # the twin calls the model too

    def look(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.inputs[-1].append(kwargs[self.name].clone())
            self.selected[-1].append(
                [n for n, p in model.named_parameters() if not torch.equal(p, self.w[n])]
            )

    @property
    def counts(self) -> list[int]:
        return [len(each) for each in self.inputs]


def trained(
    model: nn.Module,
    data: Any,
    sam: dict[str, Any],
    trainer_class: type = SAMTrainer,
    kwargs: dict[str, Any] | None = None,
    name: str = "x",
    **args: Any,
) -> tuple[Any, Spy, Passes]:
    """A trained trainer, the weights after each of its updates, and its passes."""
    spy, passes = Spy(), Passes(model, name)
    kwargs = dict(kwargs or {})
    callbacks = [spy, passes, *kwargs.pop("callbacks", [])]
    scaler = kwargs.pop("scaler", None)
    trainer = sam_trainer(
        model,
        data,
        trainer_class,
        {"callbacks": callbacks, **kwargs},
        {"sam_rho": RHO, **sam},
        **args,
    )
    if scaler is not None:  # what Accelerate does for fp16 on a GPU alone
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", *scaler)
    trainer.train()
    return trainer, spy, passes

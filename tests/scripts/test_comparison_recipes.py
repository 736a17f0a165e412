"""Recipes of the comparison: those of another package, and the ones that are refused."""

from __future__ import annotations

import compare_methods
import pytest
import torch
from common.cli import InputError
from compare import third_party_sam
from compare.arguments import Options
from compare.recipes import Recipe, RecipeBook
from compare.results import RunSpec
from compare.runs import build_trainer, train_once, train_quietly
from comparison import RECIPES, TINY, tiny_task, write_recipes

needs_package = pytest.mark.skipif(
    not third_party_sam.is_installed(), reason=f"{third_party_sam.PACKAGE} is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------- the other package


@needs_package
def test_the_other_packages_sam_takes_the_steps_of_ours(tmp_path):
    task, options = tiny_task()
    task.training["max_grad_norm"] = 0.5  # so that clipping matters
    weights = []
    for recipe in (
        Recipe("ours", "d", options={"sam_rho": 0.1}),
        Recipe("theirs", "d", trainer="pytorch-optimizer", optimizer="SAM", options={"rho": 0.1}),
    ):
        trainer = build_trainer(recipe, task, RunSpec("", "0.4", 0), options, str(tmp_path))
        train_quietly(trainer)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    ours, theirs = weights
    distance = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(ours)
    assert distance < 1e-5  # other clipping: 2e-4, a tenth more rho: 2e-2
    # Where a gradient is almost 0, rounding decides which way AdamW's step of up to 2e-3 goes.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ((ours - theirs).abs() > 2e-5).sum() <= 2


@needs_package
@pytest.mark.parametrize("optimizer", third_party_sam.OPTIMIZERS)
def test_its_wrappers_compute_two_passes_and_score_every_image(optimizer):
    task, options = tiny_task()
    recipe = Recipe("x", "d", trainer="pytorch-optimizer", optimizer=optimizer)
    record = train_once(recipe.with_rho(0.05), task, RunSpec("x", "0.4", 0), options)
    assert record["passes"] == 2.0
    scored = len(task.test)
    assert record["accuracy"] * scored == pytest.approx(round(record["accuracy"] * scored))


def test_without_the_package_its_rows_are_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(third_party_sam, "is_installed", lambda: False)
    book = RecipeBook.read(Options().recipes_file)
    chosen = book.choose(None, dict.fromkeys(book.recipes, 0.1))
    theirs = [r.name for r in book.recipes.values() if r.trainer == "pytorch-optimizer"]
    assert theirs
    assert not set(theirs) & {recipe.name for recipe in chosen}
    out = capsys.readouterr().out
    assert all(name in out for name in theirs)
    assert "pip install 'sam-hf[benchmark]'" in out


# ----------------------------------------------------------------------------------------- refusals


@needs_package
def test_the_recipes_of_the_repository_are_right():
    book = RecipeBook.read(Options().recipes_file)
    names = [recipe.name for recipe in book.choose(None, dict.fromkeys(book.grids, 0.1))]
    assert names == list(book.recipes)
    assert {trial.name for trial in book.to_tune(None)} == set(book.grids)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            {"sam_intervall": 2},
            "SAMConfig has no option 'sam_intervall' .*Did you mean 'sam_interval'",
        ),
        ({"sam_eta": 0.5}, "sam_eta=0.5 has no effect with sam_method='sam'"),
        ({"sam_interval": 0}, "sam_interval=0 is not allowed"),
        ({"sam_method": "looksam", "sam_method_args": {"kk": 5}}, ".*sam_method_args.*'kk'"),
    ],
)
def test_a_wrong_option_of_a_recipe_is_refused(recipe, said, tmp_path):
    recipes = {**RECIPES, "x": {"description": "d", "options": {"sam_rho": 0.1, **recipe}}}
    with pytest.raises(InputError, match=f"recipe 'x': {said}"):
        compare_methods.main([*TINY, *write_recipes(tmp_path, recipes)])


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"description": "d", "option": {}}, "unexpected keyword argument 'option'"),
        ({"options": {}}, "missing 1 required positional argument: 'description'"),
        ({"description": "d", "trainer": "theirs"}, "trainer 'theirs' is none of plain, sam_hf"),
        ({"description": "d", "optimizer": "SAM"}, "optimizer has no effect with trainer 'sam_hf'"),
        ("sam", "recipe 'x': .*must be a mapping, not str"),
        ({"description": "d", "options": "sam"}, "options must hold `option: value` lines"),
    ],
)
def test_a_wrong_recipe_is_refused(recipe, said, tmp_path):
    with pytest.raises(InputError, match=said):
        book = RecipeBook.read(write_recipes(tmp_path, {**RECIPES, "x": recipe})[1])
        book.choose(None, {"x": 0.1})


@needs_package
@pytest.mark.parametrize(
    ("optimizer", "options", "said"),
    [
        ("Sam", {}, "optimizer 'Sam' is none of SAM, LookSAM, FriendlySAM"),
        ("LookSAM", {"kk": 5}, "pytorch-optimizer's LookSAM has no option 'kk'"),
    ],
)
def test_a_wrong_class_or_option_of_the_other_package_is_refused(optimizer, options, said):
    recipe = Recipe("x", "d", trainer="pytorch-optimizer", optimizer=optimizer, options=options)
    with pytest.raises(InputError, match=said):
        recipe.check()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipes", "sma"], "no recipe 'sma' .did you mean"),
        (["--recipe", "sam"], "unknown option --recipe"),
        (["--rho", "smam=0.7"], "--rho: .* has no recipe 'smam'"),
        (["--rho", "sam=0.7", "--rho_file", "x"], "--rho_file has no effect with --rho"),
        (["--reference", "adam"], "--reference 'adam' is none of the recipes"),
        (["--recipes_file", "/no/such.yaml"], "--recipes_file '/no/such.yaml' cannot be read"),
        (["--seeds", "0"], "--seeds must be two or more numbers"),
        (["--seeds", "0", "0"], "a value appears twice"),
        (["--seeds", "0", "100"], "without .100, 101, 102., which tune rho, got .0, 100"),
        (["--label_noise", "40"], "--label_noise must be from 0 to 1, got .40"),
        (["--num_workers", "0"], "--num_workers must be 1 or more, got 0"),
        (["--train_file", "x"], "--train_file has no effect with --task digits"),
        (["--depth", "16"], "--depth has no effect without --task cifar10"),
        (["--max_length", "16"], "--max_length has no effect without --task trec6, cola, rte"),
        (["--train_fraction", "1.5"], "--train_fraction must be from 0 to 1, got .1.5"),
        (["--train_fraction", "0.2"], "32 is more than --train_fraction 0.2 of the 128 training"),
        (["--task", "cifar10"], "needs --train_file"),
        (["--tune"], "--label_noise has no effect with --tune"),
        (["--per_device_train_batch_size", "500"], "is more than --train_fraction 1 of the 128"),
        (["--from_json", "/no/such.json"], "has no effect with --from_json"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(arguments, said, tmp_path):
    with pytest.raises(InputError, match=said):
        compare_methods.main([*TINY, *write_recipes(tmp_path, RECIPES), *arguments])

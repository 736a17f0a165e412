"""Landscapes: directions, losses on the grid, files that go on where they were, and pictures."""

from __future__ import annotations

import copy
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from curved import Quadratic, batches, classifier, nothing
from matplotlib.figure import Figure
from PIL import Image
from reference_sharpness import flat
from tiny import Classifier, assert_same_bits, examples, weights
from torch import nn

from sam_hf.diagnostics import (
    Landscape,
    Objective,
    Plane,
    connecting_plane,
    eigenvector_plane,
    plot_history,
    plot_landscapes,
    random_plane,
    read_landscape,
    scan,
    write_landscape,
)
from sam_hf.diagnostics import landscape as module
from sam_hf.diagnostics.plots import _levels

AXIS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_random_directions_have_the_lengths_of_the_filters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    objective = Objective(model, [torch.zeros(2, 3, 4, 4)], loss=lambda m, x: m(x).sum())
    first, second = random_plane(objective, seed=3).directions
    for d, w in zip(first, objective.weights, strict=True):
        if w.ndim == 1:
            assert (d == 0).all()
            continue
        for filter_, own in zip(d, w, strict=True):
            assert filter_.norm().item() == pytest.approx(own.norm().item(), rel=1e-5)
    assert not torch.equal(first[0], second[0])
    again = random_plane(objective, seed=3).directions[0]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(random_plane(objective, seed=4).directions[0][0], first[0])


def test_the_filters_of_gpt2_and_of_transposed_convolutions_lie_along_the_second_dimension():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.Flatten(), Conv1D(5, 12))
    objective = Objective(model, [torch.zeros(2, 3, 2)], loss=lambda m, x: m(x).sum())
    (direction,) = random_plane(objective, 1).directions
    pairs = zip(direction, objective.weights, strict=True)
    lengths = dict(zip(objective.names, pairs, strict=True))
    for name, others in (("0.weight", (0, 2)), ("2.weight", (0,))):
        d, w = (x.detach().norm(dim=others) for x in lengths[name])
        torch.testing.assert_close(d, w, rtol=1e-5, atol=0)


def test_the_losses_are_those_at_the_points_of_the_grid():
    model = Quadratic(slope=1.0)
    objective = Objective(model, nothing())
    plane = eigenvector_plane(objective)
    found = scan(objective, plane, [AXIS, [-2.0, 0.0, 1.0]], progress=False)
    w = flat([x.detach() for x in objective.weights])
    a, b = (flat(d) for d in plane.directions)
    for i, x in enumerate(AXIS):
        for j, y in enumerate([-2.0, 0.0, 1.0]):
            v = w + x * a + y * b
            expected = (v @ model.h @ v / 2 + model.c @ v).item()
            assert found.losses[i, j].item() == pytest.approx(expected, rel=1e-10)
    assert found.facts["eigenvalues"] == pytest.approx([7.0, 6.0])
    # Along the eigenvector the second difference is the eigenvalue.
    line = found.losses[:, 1]
    bend = (line[3] - 2 * line[2] + line[1]) / 0.25
    assert bend.item() == pytest.approx(7.0, rel=1e-9)


def test_between_two_models_weights_and_running_statistics_go_along():
    torch.manual_seed(0)

    def model():
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    first, second = model(), model()
    x, labels = torch.randn(16, 5, dtype=torch.float64), torch.randint(0, 3, (16,))
    for each in (first, second):
        each(x * 3 + 1)  # running statistics of its own
        each.eval()

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    objective = Objective(first, [(x, labels)], loss=loss)
    before = weights(first), weights(second)
    found = scan(objective, connecting_plane(objective, second), [[0.0, 0.5, 1.0]], progress=False)
    middle = copy.deepcopy(first)
    mixed = {
        n: (a + second.state_dict()[n]) / 2 if a.is_floating_point() else a
        for n, a in first.state_dict().items()
    }
    middle.load_state_dict(mixed)
    expected = [Objective(m, [(x, labels)], loss=loss).value() for m in (first, middle, second)]
    assert found.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert_same_bits(first, before[0])
    assert_same_bits(second, before[1])


def test_running_statistics_stay_beyond_the_two_models():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double() for _ in range(2)]
    x = torch.randn(16, 5, dtype=torch.float64)
    models[1](9 * x)
    objective = Objective(models[0], [x], loss=lambda m, x: m(x).square().mean())
    plane = connecting_plane(objective, models[1])
    assert (models[1][1].running_var - 1).max() > 0.5  # linearly, at -2 it is below 0
    for end, statistics in ((-2.0, models[0][1]), (3.0, models[1][1])):
        beyond = copy.deepcopy(models[0])
        beyond[1].load_state_dict(statistics.state_dict())
        with torch.no_grad():
            ends = [dict(m.named_parameters()) for m in models]
            for name, w in beyond.named_parameters():
                w.copy_(ends[0][name] + end * (ends[1][name] - ends[0][name]))
        expected = beyond.eval()(x).square().mean().item()
        found = scan(objective, plane, [[end]], progress=False).losses
        assert found.item() == pytest.approx(expected, rel=1e-10)


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().mean()


def test_a_line_between_tied_and_untied_weights_ends_at_the_second_or_is_refused():
    torch.manual_seed(0)
    tied, untied = Tied(True), Tied(False)
    x = [torch.randn(8, 4, dtype=torch.float64)]
    objective = Objective(untied, x, loss=lambda m, x: m(x))
    line = scan(objective, connecting_plane(objective, tied), [[0.0, 1.0]], progress=False)
    ends = [untied(x[0]).item(), tied(x[0]).item()]
    assert line.losses.tolist() == pytest.approx(ends, rel=1e-12)
    backwards = Objective(tied, x, loss=lambda m, x: m(x))
    with pytest.raises(
        ValueError, match=r"second\.weight is tied to first\.weight in the first model"
    ):
        connecting_plane(backwards, untied)


def test_a_line_to_a_third_model_does_not_take_the_file_of_the_second(tmp_path):
    objective, file = classifier(), tmp_path / "line.parquet"
    others = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        others.append(Classifier())
    scan(objective, connecting_plane(objective, others[0]), [[0.0, 1.0]], path=file, progress=False)
    with pytest.raises(ValueError, match="of other weights, data, directions"):
        plane = connecting_plane(objective, others[1])
        scan(objective, plane, [[0.0, 1.0]], path=file, progress=False)


def test_a_scan_does_not_go_on_along_eigenvectors_that_have_become_others(tmp_path):
    values = torch.linspace(1.0, 9.0, 7, dtype=torch.float64)
    objective, file = Objective(Quadratic(values, slope=0.7), nothing()), tmp_path / "line.parquet"
    plane = eigenvector_plane(objective, 1)
    assert max(flat(plane.directions[0]).tolist(), key=abs) > 0
    found = scan(objective, plane, [AXIS], path=file, progress=False)
    other = Plane([[-d for d in plane.directions[0]]], plane.labels, facts=plane.facts)
    with pytest.raises(ValueError, match="was computed along other directions: at "):
        scan(objective, other, [AXIS], path=file, progress=False)
    again = scan(objective, plane, [AXIS], path=file, progress=False)
    assert torch.equal(found.losses, again.losses)


def test_a_line_that_would_not_end_at_the_second_model_is_refused():
    torch.manual_seed(0)
    objective = Objective(Classifier(), batches(examples(4), 4), params="norms")
    with pytest.raises(ValueError, match=r"first\.weight differs, but .* params='norms'"):
        connecting_plane(objective, Classifier())


def test_eigenvectors_that_are_not_found_yet_are_told():
    values = torch.linspace(1.0, 9.0, 7, dtype=torch.float64)
    objective = Objective(Quadratic(values), nothing())
    with pytest.warns(UserWarning, match="iterations=2 are too few"):
        eigenvector_plane(objective, 2, iterations=2)


def test_models_that_differ_are_not_joined():
    objective = classifier()
    with pytest.raises(
        ValueError, match=r"Classifier and Linear cannot be interpolated: they differ in"
    ):
        connecting_plane(objective, nn.Linear(5, 3))


def test_a_scan_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_WRITES", 0.0)
    file, calls = tmp_path / "new" / "landscape.parquet", 0
    torch.manual_seed(0)
    model, data = Classifier(), batches(examples(4), 4)

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return model(**batch)["loss"]

    def run():
        objective = Objective(model, data, loss=loss)
        return scan(objective, random_plane(objective), [AXIS, AXIS], path=file, progress=False)

    stop_at = 12  # the loss at w is the first
    with pytest.raises(KeyboardInterrupt):
        run()
    part = read_landscape(file)
    assert int(part.losses.isfinite().sum()) == 10 and not part.is_complete
    calls, stop_at = 0, None
    whole = run()
    assert calls == 2 + 15 and whole.is_complete  # the loss at w, and a point that is known
    calls = 0
    again = run()
    assert calls == 2 and torch.equal(again.losses, whole.losses)
    direct = scan(
        Objective(model, data), random_plane(Objective(model, data)), [AXIS, AXIS], progress=False
    )
    assert torch.equal(direct.losses, whole.losses)
    with torch.no_grad():
        model.second.bias += 1
    with pytest.raises(ValueError, match="of other weights, data, directions or points"):
        run()


def test_a_file_comes_back_as_it_was_written(tmp_path):
    losses = torch.tensor([[1.0, math.inf], [math.nan, -2.5]], dtype=torch.float64)
    written = Landscape("a/b", ["x", "y"], [[-1.0, 1.0], [0.0, 3.0]], losses, {"seed": 1})
    write_landscape(written, tmp_path / "it.parquet")
    read = read_landscape(tmp_path / "it.parquet")
    assert (read.name, read.labels, read.coordinates, read.facts) == (
        *("a/b", ["x", "y"], [[-1.0, 1.0], [0.0, 3.0]], {"seed": 1}),
    )
    torch.testing.assert_close(read.losses, losses, equal_nan=True, rtol=0, atol=0)
    (tmp_path / "other.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a landscape file"):
        read_landscape(tmp_path / "other.parquet")


def test_a_disk_that_is_full_leaves_the_file_of_before(tmp_path, monkeypatch):
    from pyarrow import parquet

    file = tmp_path / "it.parquet"
    written = Landscape("a", ["x"], [[0.0, 1.0]], torch.zeros(2, dtype=torch.float64), {})
    write_landscape(written, file)
    before = file.read_bytes()

    def full(table, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_landscape(written, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_losses_that_overflow_are_infinite_and_drawn_as_the_highest(tmp_path):
    objective = Objective(
        Quadratic(), nothing(), loss=lambda m, b: (m(**b)["loss"] * 20).exp().sqrt()
    )
    found = scan(objective, eigenvector_plane(objective), [[-40.0, 0.0, 40.0]] * 2, progress=False)
    assert found.losses.isinf().any() and found.losses[1, 1].isfinite()
    files = plot_landscapes([found], tmp_path / "it")
    assert [f.name for f in files] == ["it.png", "it.svg"]


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_name_their_axes_and_models(tmp_path, dimensions, count):
    found = []
    for number in range(count):
        torch.manual_seed(number)
        objective = Objective(Classifier(), batches(examples(8), 4))
        plane = random_plane(objective, dimensions)
        axes = [AXIS] * dimensions
        found.append(scan(objective, plane, axes, name=f"model {number}", progress=False))
    png, svg = plot_landscapes(found, tmp_path / "folder" / "picture")
    assert min(Image.open(png).size) > 500
    root = ElementTree.parse(svg).getroot()
    comments = svg.read_text()
    assert root.tag.endswith("svg")
    names = " and ".join(f"model {number}" for number in range(count))
    shape = "plane" if dimensions == 2 else "line"
    title = f"Loss on a random {shape}: {names}, 8 examples"
    for text in ("loss", "random direction, filter-normalised", title):
        assert f"<!-- {text}" in comments
    if count == 2 or dimensions == 2:
        assert all(f"<!-- model {number}" in comments for number in range(count))
    first = png.read_bytes()
    plot_landscapes(found, tmp_path / "folder" / "picture")
    assert png.read_bytes() == first


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.3013, 2.3121, [2.301 + 0.001 * i for i in range(13)]),
        (0.12, 7.1, [0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0]),
        (-0.9, 11.0, [-1.0 + i for i in range(13)]),
        (1e-9, 9.0, [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]),
    ],
)
def test_the_levels_of_the_loss_are_round(low, high, expected):
    assert _levels(low, high) == pytest.approx(expected)


def test_the_title_is_above_those_of_the_models_and_within_the_picture(tmp_path, monkeypatch):
    overlaps, facts = [], {"loss_at_weights": 1.0, "examples": 8, "directions": "eigenvectors"}
    real = Figure.savefig

    def save(figure, *args, **options):
        real(figure, *args, **options)
        if options["format"] == "png":
            figure.dpi = options["dpi"]  # as it was drawn
            title = figure._suptitle.get_window_extent()
            overlaps.extend(title.overlaps(ax.title.get_window_extent()) for ax in figure.axes)

    monkeypatch.setattr(Figure, "savefig", save)
    losses = torch.arange(9.0).reshape(3, 3)
    axis = [-1.0, 0.0, 1.0]
    found = [Landscape(f"model {i}", ["a", "b"], [axis] * 2, losses, facts) for i in range(2)]
    plot_landscapes(found, tmp_path / "it")
    assert overlaps == [False] * 3
    title = "Loss on the sharpest plane: model 0 and model 1, 8 examples"
    assert f"<!-- {title} -->" in (tmp_path / "it.svg").read_text()
    plot_landscapes(found[:1], tmp_path / "long", title="long title " * 20)
    assert Image.open(tmp_path / "long.png").width > 1500  # more than the figure


def test_a_history_is_drawn_with_a_frame_for_each_measure(tmp_path):
    history = {f"sharpness/{i}": [(0, 1.0), (10, 0.5)] for i in range(4)}
    _, svg = plot_history(history, tmp_path / "it")
    assert all(f"<!-- sharpness/{i} -->" in svg.read_text() for i in range(4))


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (
            lambda o: scan(o, random_plane(o), [AXIS]),
            "coordinates has 1 axes. Allowed: as many as .* 2",
        ),
        (lambda o: scan(o, random_plane(o), [AXIS, [1.0, 0.0]]), "Allowed: ascending numbers"),
        (lambda o: scan(o, random_plane(o), [AXIS, []]), "Allowed: ascending numbers"),
        (
            lambda o: scan(o, random_plane(o), [AXIS] * 3),
            "coordinates has 3 axes. Allowed: as many as .* 2",
        ),
        (lambda o: random_plane(o, 3), "dimensions=3 is not allowed. Allowed: 1 and 2"),
        (lambda o: eigenvector_plane(o, 0), "dimensions=0 is not allowed. Allowed: 1 and 2"),
        (
            lambda o: random_plane(classifier(params="norms")),
            "params='norms' selects no weight with",
        ),
        (lambda o: plot_landscapes([], None), "one or more"),
        (lambda o: plot_history({}, None), "history is empty"),
    ],
)
def test_what_makes_no_grid_is_refused(action, said):
    with pytest.raises(ValueError, match=said):
        action(classifier())

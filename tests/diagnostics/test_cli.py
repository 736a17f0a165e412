"""`sam-hf`: on the digits, files and folders; with wrong names; stopped and started again."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hub_server import Repository, hub_server, use_hub
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from sam_hf import SAMConfig, __version__, cli
from sam_hf.cli.data import DataOptions, load_batches
from sam_hf.cli.models import load_model
from sam_hf.cli.output import table
from sam_hf.diagnostics import Ball, Objective, radius_curve, read_landscape, worst_sharpness

QUICK = ["--examples", "24", "--batch_size", "8"]
FEW = [*QUICK, "--steps", "2", "--samples", "2", "--iterations", "3", "--trace_samples", "2"]


def save_vit(folder, seed=0, hidden=16):
    torch.manual_seed(seed)
    names = {i: str(i) for i in range(10)}
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the"]


def save_bert(folder, kind=BertForSequenceClassification):
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(
        **sizes, num_attention_heads=2, vocab_size=len(WORDS), label2id={"neg": 0, "pos": 1},
        id2label={0: "neg", 1: "pos"},
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


TEXTS = {"sentence": ["good film", "a bad film", "the good", "bad"] * 4, "label": [1, 0, 1, 0] * 4}


def test_the_sharpness_of_a_model_on_the_digits_is_that_of_the_library(vit, tmp_path, capsys):
    folder = tmp_path / "out"
    assert cli.main(["sharpness", vit, *FEW, "--rho", "0.1", "--output_dir", str(folder)]) == 0
    result = json.loads((folder / "sharpness.json").read_text())
    model = load_model(vit)
    batches = load_batches(DataOptions(examples=24, batch_size=8), model)
    expected = worst_sharpness(Objective(model, batches), Ball(0.1), steps=2).value
    assert result["measures"]["worst_sharpness"] == pytest.approx(expected, rel=1e-6)
    assert result["examples"] == 24 and result["options"]["rho"] == 0.1
    assert result["hessian_products"] == "exact"
    printed = capsys.readouterr()
    assert "worst_sharpness" in printed.out and "sharpness.json" in printed.out
    assert "hessian_eigenvalue " in printed.out and "_error" not in printed.out


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_the_rho_of_a_model_on_the_digits_is_that_of_the_library(vit, tmp_path, capsys, method):
    folder = tmp_path / "out"
    options = [*QUICK, "--method", method, "--target_sharpness", "0.4", "--output_dir", str(folder)]
    assert cli.main(["rho", vit, *options]) == 0
    assert {f.name for f in folder.iterdir()} == {"rho.json", "rho.png", "rho.svg"}
    result = json.loads((folder / "rho.json").read_text())
    model = load_model(vit)
    objective = Objective(model, load_batches(DataOptions(examples=24, batch_size=8), model))
    config = SAMConfig(sam_rho=None, sam_method=method, sam_target_sharpness=0.4)
    expected = radius_curve(objective, config)
    assert result["suggestion"] == pytest.approx(expected.suggestion, rel=1e-4)
    assert result["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert [r["cosine"] for r in result["readings"]] == pytest.approx(
        [r.cosine for r in expected.readings], rel=1e-3
    )
    assert result["examples"] == 24 and result["reason"] == ""
    told = capsys.readouterr()
    assert "up to 46 forward-backward passes" in told.err and "rho: 100%" in told.err
    lines = told.out.splitlines()
    assert lines[0] == f"loss at w: {expected.loss:.4g}" and lines[2].split()[:2] == [
        "rho",
        "cosine",
    ]
    assert len(lines[3].split()) == 4 or "about 0" in lines[3]
    assert lines[-1] == (
        f"suggestion for a sharpness of {expected.goal:.3g}, the goal of the automatic radius at "
        "the start of training (its minimum: see --initial_loss): "
        f"--sam_method {method} --sam_rho {expected.suggestion:.3g}"
    )
    words = ["rho", vit, *options, "--rho", "1e-9", "1e-8", "--initial_loss", "9"]
    assert cli.main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    goal = 0.4 * min(9 - expected.loss, expected.loss)
    assert last == (
        f"no suggestion for a sharpness of {goal:.3g}, the goal of the automatic radius after an "
        "initial loss of 9: the largest rho, 1e-08, gives less"
    )
    assert len(json.loads((folder / "rho.json").read_text())["readings"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rho", "0.1", "-1"], "--rho=-1.0 is not allowed. Allowed: a finite number > 0."),
        (["--rho", "x"], "argument --rho: invalid float value: 'x'"),
        (["--target_sharpness", "2"], "--target_sharpness=2.0 is not allowed. Allowed: a number"),
        (["--initial_loss", "nan"], "--initial_loss=nan is not allowed. Allowed: a finite number"),
        (
            ["--eta", "-1", "--method", "asam"],
            "--eta=-1.0 is not allowed. Allowed: a finite number",
        ),
        (
            ["--method", "asma"],
            "--method='asma' is not allowed. Allowed: one of 'sam', 'asam'. Did you mean 'asam'?",
        ),
        (["--target_sharpnes", "x"], "argument --target_sharpness: invalid float value: 'x'"),
        (["--targte_sharpness", "0.9"], "Did you mean --target_sharpness?"),
        (["--iterations", "3"], "unrecognized arguments: --iterations 3"),
        (["--params", "nose"], "params='nose' selects no trainable"),
        (["--output_dir", "taken"], "holds the measures of model 'other'"),
    ],
)
def test_misuse_of_rho_is_one_line(vit, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "rho.json").write_text(json.dumps({"model": "other"}))
    try:
        code = cli.main(["rho", vit, *QUICK, *options])
    except SystemExit as error:
        code = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and said in lines[0]


def test_two_models_lie_side_by_side_on_one_scale(vit, tmp_path, capsys):
    other = save_vit(tmp_path / "other", seed=1)
    folder = tmp_path / "out"
    words = ["landscape", vit, other, *QUICK, "--points", "3", "--output_dir", str(folder)]
    assert cli.main(words) == 0
    names = {f.name for f in folder.iterdir()}
    stem = "landscape_random_2d"
    assert names == {f"{stem}.png", f"{stem}.svg", f"{stem}_1.parquet", f"{stem}_2.parquet"}
    first, second = (read_landscape(folder / f"{stem}_{i}.parquet") for i in (1, 2))
    assert (first.name, second.name) == ("vit", "other")
    assert first.losses.shape == (3, 3) and first.is_complete
    assert "saved in" in capsys.readouterr().out
    svg = (folder / f"{stem}.svg").read_text()
    assert "<!-- vit" in svg and "<!-- other" in svg and "loss (one scale)" in svg


@pytest.mark.parametrize(
    "options", [["--directions", "eigenvectors", "--dimensions", "1"], ["--directions", "between"]]
)
def test_lines_along_an_eigenvector_and_between_two_models(vit, tmp_path, options):
    other = save_vit(tmp_path / "other", seed=1)
    names = [vit, other] if "between" in options else [vit]
    folder = tmp_path / "out"
    words = ["landscape", *names, "digits", *QUICK, "--points", "3", "--output_dir", str(folder)]
    assert cli.main([*words, *options]) == 0
    (file,) = folder.glob("*.parquet")
    found = read_landscape(file)
    if "between" in options:
        assert found.coordinates == [[-0.5, 0.5, 1.5]] and found.name == "vit to other"
    else:
        assert "eigenvector of λ" in found.labels[0]


def test_a_landscape_that_was_stopped_goes_on(vit, tmp_path, monkeypatch, capsys):
    from sam_hf.diagnostics import landscape

    real, points = landscape._loss_at, []

    def stopped(*args):
        if len(points) == 4:
            raise KeyboardInterrupt
        points.append(args)
        return real(*args)

    monkeypatch.setattr(landscape, "_loss_at", stopped)
    words = ["landscape", vit, *QUICK, "--points", "3", "--output_dir", str(tmp_path)]
    assert cli.main(words) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    points.clear()
    monkeypatch.setattr(landscape, "_loss_at", lambda *args: points.append(args) or real(*args))
    assert (
        cli.main(words) == 0 and len(points) == 1 + 5
    )  # a known one, to be sure of the directions


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "folder", "dict"])
def test_texts_from_files_and_folders(bert, tmp_path, kind):
    data = Dataset.from_dict(TEXTS)
    path = tmp_path / (kind if kind in ("folder", "dict") else f"data.{kind}")
    if kind == "folder":
        data.save_to_disk(path)
    elif kind == "dict":
        DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(path)
    else:
        {"parquet": data.to_parquet, "csv": data.to_csv, "jsonl": data.to_json}[kind](path)
    split = ["--split", "test"] if kind == "dict" else []
    words = ["sharpness", bert, str(path), *FEW, *split, "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    result = json.loads((tmp_path / "out" / "sharpness.json").read_text())
    assert result["examples"] == (4 if kind == "dict" else 16)


def test_labels_by_name_and_in_another_order_are_those_of_the_model(bert, tmp_path):
    model = load_model(bert)
    features = Features({"words": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    named = Dataset.from_dict({"words": ["good", "bad"], "label": [0, 1]}, features=features)
    named.save_to_disk(tmp_path / "named")
    words = Dataset.from_dict({"words": ["good", "bad"], "label": ["pos", "neg"]})
    words.to_parquet(tmp_path / "words.parquet")
    for name in ("named", "words.parquet"):
        (batch,) = load_batches(DataOptions(str(tmp_path / name)), model)
        assert batch["labels"].tolist() == [1, 0]
        assert batch["input_ids"].shape == (2, 3)  # the label is no part of the text


def test_labels_are_matched_however_they_are_written_and_told_where_they_are_not(bert, tmp_path):
    model = load_model(bert)
    for names, expected in ((["POS", "Neg"], [1, 0]), (["good", "bad"], [0, 1])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
        rows.save_to_disk(tmp_path / names[0])
        options = DataOptions(str(tmp_path / names[0]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (batch,) = load_batches(options, model)
        assert batch["labels"].tolist() == expected
        told = [str(w.message) for w in caught if "classes of the data" in str(w.message)]
        assert len(told) == (names[0] == "good")


def test_classes_that_differ_in_case_alone_stay_apart(bert, tmp_path):
    names = ["A", "B", "a", "b"]
    model = load_model(bert)
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.config.num_labels = 4
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": ["a"] * 4, "label": [0, 1, 2, 3]}, features=features)
    rows.save_to_disk(tmp_path / "data")
    (batch,) = load_batches(DataOptions(str(tmp_path / "data")), model)
    assert sorted(batch["labels"].tolist()) == [0, 1, 2, 3]
    model.config.label2id = {"Ab": 0, "aB": 1}
    Dataset.from_dict({"text": ["a"], "label": ["AB"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"the label 'AB' is not a class of .* Allowed: Ab, aB"):
        load_batches(DataOptions(str(tmp_path / "x.parquet")), model)


def test_a_model_that_names_its_classes_by_number_alone(bert, tmp_path):
    model = load_model(bert)
    model.config.label2id = None
    Dataset.from_dict({"text": ["good", "bad"], "label": ["pos", "pos"]}).to_csv(tmp_path / "x.csv")
    (batch,) = load_batches(DataOptions(str(tmp_path / "x.csv")), model)
    assert batch["labels"].tolist() == [1, 1]


def test_pairs_that_are_known_are_taken_and_the_text_among_others(bert, tmp_path):
    model = load_model(bert)
    rows = {"id": ["a"], "premise": ["good"], "hypothesis": ["the film"], "label": [True]}
    for columns, length in ((("premise", "hypothesis"), 6), (("premise",), 3)):
        kept = {name: x for name, x in rows.items() if name in (*columns, "id", "label")}
        kept = {"text" if columns == (name,) else name: x for name, x in kept.items()}
        Dataset.from_dict(kept).to_parquet(tmp_path / f"{length}.parquet")
        (batch,) = load_batches(DataOptions(str(tmp_path / f"{length}.parquet")), model)
        assert batch["input_ids"].shape == (1, length) and batch["labels"].tolist() == [1]


def save_gpt(folder):
    save_bert(folder, kind=BertForMaskedLM)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=len(WORDS))).save_pretrained(folder)
    return str(folder)


def test_texts_in_which_nothing_is_to_be_predicted_are_left_out_with_a_line(tmp_path):
    gpt = save_gpt(tmp_path / "gpt")
    model = load_model(gpt)
    Dataset.from_dict({"text": ["good film", "", "bad", "a bad film"]}).to_parquet(
        tmp_path / "texts.parquet"
    )
    with pytest.MonkeyPatch.context() as patch:
        real = BertTokenizer.__call__
        patch.setattr(
            BertTokenizer,
            "__call__",
            lambda self, *texts, **options: real(self, *texts, add_special_tokens=False, **options),
        )
        options = DataOptions(str(tmp_path / "texts.parquet"), batch_size=1)
        with pytest.warns(UserWarning, match="2 of 4 texts are skipped: they have fewer than two"):
            batches = load_batches(options, model)
    assert sorted(batch["input_ids"].shape[1] for batch in batches) == [2, 3]


def test_a_folder_of_images_and_a_language_model(vit, tmp_path):
    for label in "12":
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("L", (8, 8), 100 * int(label)).save(tmp_path / "images" / label / "0.png")
    model = load_model(vit)
    (batch,) = load_batches(DataOptions(str(tmp_path / "images")), model)
    assert batch["labels"].tolist() == [1, 2]  # by name: those of the folder are 0 and 1
    folder = save_gpt(tmp_path / "gpt")
    Dataset.from_dict(TEXTS).to_parquet(tmp_path / "texts.parquet")
    options = DataOptions(str(tmp_path / "texts.parquet"), examples=5)
    (batch,) = load_batches(options, load_model(folder))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_plugin_registers_a_model_of_ones_own(tmp_path, vit):
    (tmp_path / "own_model.py").write_text(
        "from transformers import AutoConfig, AutoModelForImageClassification\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own_vit'\n"
        "class OwnForImageClassification(ViTForImageClassification):\n"
        "    config_class = OwnConfig\n"
        "AutoConfig.register('own_vit', OwnConfig)\n"
        "AutoModelForImageClassification.register(OwnConfig, OwnForImageClassification)\n"
    )
    folder = tmp_path / "own"
    shutil.copytree(vit, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_vit", "architectures": ["OwnForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    words = ["sharpness", str(folder), *FEW, "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert cli.main([*words, "--plugin", str(tmp_path / "own_model.py")]) == 0


def wrong(vit, bert, tmp_path):
    Dataset.from_dict({"a": ["x"], "b": ["y"], "n": [7], "k": [1]}).to_parquet(
        tmp_path / "x.parquet"
    )
    (tmp_path / "wrong.py").write_text("def")
    Dataset.from_dict(TEXTS).save_to_disk(tmp_path / "saved")
    dirty = {"none": ["good", None], "foreign": ["good", "bad"], "n": [0, 1], "null": [0, None]}
    dirty["string"] = ["pos", "no"]
    Dataset.from_dict(dirty).to_parquet(tmp_path / "dirty.parquet")
    dirty = str(tmp_path / "dirty.parquet")
    foreign = save_bert(tmp_path / "foreign")
    (tmp_path / "foreign" / "vocab.txt").write_text(
        "\n".join([*WORDS[:5], *"abcdef", "good", "bad"])
    )
    shutil.rmtree(tmp_path / "foreign" / "tokenizer.json", ignore_errors=True)
    (tmp_path / "foreign" / "tokenizer.json").unlink(missing_ok=True)
    BertTokenizer(str(tmp_path / "foreign" / "vocab.txt")).save_pretrained(foreign)
    pictures = tmp_path / "pictures"
    for label in "12":
        (pictures / label).mkdir(parents=True)
        (pictures / label / "0.png").write_text("no picture")
    x = str(tmp_path / "x.parquet")
    other = save_vit(tmp_path / "wide", hidden=32)
    masked = save_bert(tmp_path / "masked", kind=BertForMaskedLM)
    broken = save_vit(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "taken").mkdir()
    taken = str(tmp_path / "taken")
    (tmp_path / "taken" / "sharpness.json").write_text(json.dumps({"model": vit}))
    return [
        (["sharpness", str(tmp_path)], "has no config.json"),
        (["sharpness", "no/such-model"], "no model 'no/such-model'"),
        (["sharpness", masked], "is a BertForMaskedLM, which is not supported"),
        (["sharpness", vit, "no/such.parquet"], "no data 'no/such.parquet'"),
        (["sharpness", vit, "./no.parquet"], "there is no file or folder './no.parquet'"),
        (["sharpness", bert], "DATA is needed for a text model (AutoModelForSequenceClass"),
        (["landscape", bert, bert], f"for example: sam-hf sharpness {bert} stanfordnlp/sst2"),
        (["sharpness", vit, vit + "/config.txt"], "there is no file or folder"),
        (["sharpness", vit, "--rho", "-1"], "rho=-1.0 is not allowed"),
        (["sharpness", vit, "--trace_samples", "1"], "trace_samples=1 is not allowed"),
        (["sharpness", vit, "--params", "(", *FEW], "params='(' does not compile"),
        (["sharpness", vit, "--split", "test"], "--split test: digits has no splits"),
        (["landscape", vit, str(tmp_path / "misspelt")], "there is no file or folder"),
        (["sharpness", vit, "--examples", "0"], "'0' is not allowed. Allowed: an integer >= 1"),
        (["sharpness", vit, "--exmples", "4"], "Did you mean --examples?"),
        (["sharpness", vit, "--params", "nose", *FEW], "params='nose' selects no trainable"),
        (
            ["sharpness", vit, *FEW, "--m", "12"],
            "m=12 is not allowed: it is not a multiple of the batch size 8",
        ),
        (["sharpness", vit, *FEW, "--device", "cuda:9"], "--device cuda:9"),
        (["sharpness", vit, "--plugin", "no_such_module"], "--plugin no_such_module"),
        (["sharpness", vit, "--plugin", str(tmp_path / "wrong.py")], "wrong.py: "),
        (["sharpness", bert, x], "cannot infer the column of the labels from a, b, n, k"),
        (
            ["sharpness", bert, x, "--label_column", "z"],
            "--label_column 'z': the columns are a, b, n, k",
        ),
        (
            ["sharpness", bert, x, "--label_column", "k"],
            "cannot infer the column of the texts from",
        ),
        (
            ["sharpness", bert, x, "--label_column", "n", "--text_column", "a"],
            "the label 7 is not a class",
        ),
        (["sharpness", bert, str(tmp_path / "saved"), "--split", "test"], "saved has no splits"),
        (
            ["sharpness", bert, dirty, "--text_column", "none", "--label_column", "n"],
            "1 of 2 texts",
        ),
        (
            ["sharpness", bert, dirty, "--text_column", "foreign", "--label_column", "null"],
            "the label None is not a class of the model",
        ),
        (
            ["sharpness", bert, dirty, "--text_column", "foreign", "--label_column", "string"],
            "the label 'no' is not a class of the model",
        ),
        (
            ["sharpness", foreign, dirty, "--text_column", "foreign", "--label_column", "n"],
            "they do not belong together",
        ),
        (["sharpness", vit, str(pictures)], "--image_column 'image': an image cannot be read: "),
        (["sharpness", bert, x, "--text_column", "z", "--label_column", "k"], "--text_column 'z'"),
        (["sharpness", vit, x, "--label_column", "k"], "cannot infer the column of the images"),
        (["sharpness", vit, x, "--label_column", "k", "--image_column", "z"], "--image_column 'z'"),
        (["sharpness", broken], "cannot be loaded: "),
        (
            ["sharpness", vit, "--seed", "9" * 30],
            "is not allowed. Allowed: an integer >= 0 and < 2^63",
        ),
        (["sharpness", other, *FEW, "--output_dir", taken], "holds the measures of model"),
        (["landscape", vit, "--span", "inf"], "--span inf is not allowed"),
        (["landscape", vit, vit, "digits", "more"], "expected MODEL [MODEL2] [DATA], got 4 names"),
        (["landscape", vit, "--directions", "between"], "needs two models, got 1"),
        (["landscape", vit, other, *QUICK, "--directions", "between"], "they differ in"),
        (
            ["landscape", vit, vit, "--directions", "between", "--dimensions", "2"],
            "--dimensions 2 is not allowed with",
        ),
        (["landscape", vit, "--span", "-1"], "--span -1.0 is not allowed. Allowed: a finite"),
        (
            ["landscape", vit, "--points", "1"],
            "--points: '1' is not allowed. Allowed: an integer >= 2",
        ),
        (["landscape", vit, "--directions", "sideways"], "invalid choice: 'sideways'"),
        ([], "the following arguments are required: command"),
    ]


def test_misuse_is_one_line_that_says_what_is_wrong(vit, bert, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, said in wrong(vit, bert, tmp_path):
        try:
            code = cli.main(words)
        except SystemExit as error:
            code = error.code
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if "error:" in line]
        assert code == 2 and len(lines) == 1 and said in lines[0], (words, err)
        assert "Traceback" not in err


def test_the_command_is_installed_and_helps():
    command = [str(Path(sys.executable).with_name("sam-hf")), "landscape", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--directions" in done.stdout
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="sam-hf")
    assert script.load() is cli.main


def test_the_version_and_the_defaults_are_told(capsys):
    command = [sys.executable, "-m", "sam_hf", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"sam-hf {__version__}\n"
    for command in ("sharpness", "landscape", "rho"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "(default: digits for image models)" in told and "random seed (default: 0)" in told


@pytest.mark.parametrize("module", ["datasets", "matplotlib", "PIL", "sklearn"])
def test_what_is_missing_is_named_with_its_extra_before_a_model_is_loaded(
    vit, monkeypatch, capsys, module
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_: pytest.fail())
    assert cli.main(["sharpness", vit]) == 2
    told = f"error: {module} not installed: pip install 'sam-hf[diagnostics]'\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("name", ["./no", "/no/such", "~/no", "no/such/model", "here/no"])
def test_a_path_is_not_asked_for_on_the_hub(vit, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for class_name in ("AutoConfig", "AutoModelForImageClassification"):
        monkeypatch.setattr(
            getattr(transformers, class_name), "from_pretrained", lambda *_, **__: pytest.fail()
        )
    assert cli.main(["sharpness", name]) == 2 and cli.main(["sharpness", vit, name]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"sam-hf: error: there is no folder {name!r}"
    assert second == f"sam-hf: error: there is no file or folder {name!r}"


def save_adapter(folder, base, auto_class, **options):
    torch.manual_seed(1)
    model = getattr(transformers, auto_class).from_pretrained(base, **options.pop("of_base", {}))
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    adapted.eval().save_pretrained(folder)
    return adapted


def test_of_an_adapter_its_own_weights_are_measured(vit, tmp_path):
    folder = tmp_path / "adapter"
    options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    saved = save_adapter(folder, vit, "AutoModelForImageClassification", **options)
    for option, file in (("sharpness", "sharpness.json"), ("landscape", "landscape_random_1d.png")):
        words = [option, str(folder), *QUICK, "--output_dir", str(tmp_path / "out")]
        few = FEW[4:] if option == "sharpness" else ["--points", "3", "--dimensions", "1"]
        assert cli.main([*words, *few]) == 0 and (tmp_path / "out" / file).exists()
    result = json.loads((tmp_path / "out" / "sharpness.json").read_text())
    batches = load_batches(DataOptions(examples=24, batch_size=8), load_model(vit))
    expected = Objective(saved, batches)
    assert result["parameters"] == expected.parameter_count == 2 * 2 * 16 + 170
    assert result["measures"]["loss"] == pytest.approx(expected.value(), rel=1e-6)


def test_an_adapter_on_the_hub_is_measured_as_one_in_a_folder(vit, tmp_path, monkeypatch):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    saved = save_adapter(tmp_path / "adapter", vit, "AutoModelForImageClassification", **options)
    with hub_server() as server:
        use_hub(monkeypatch, server.url, str(tmp_path / "cache"))
        server.repositories["me/adapter"] = repository = Repository()
        files = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
        repository.commit("the adapter", files)
        model = load_model("me/adapter")
    for (name, w), (_, v) in zip(saved.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(w, v), name
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 16 + 170


@pytest.mark.parametrize("kind", ["SEQ_CLS", "CAUSAL_LM"])
def test_an_adapter_on_a_base_without_its_head_and_without_a_tokenizer(tmp_path, kind):
    # As on a pretrained model: the head for three classes is in the adapter alone.
    is_language = kind == "CAUSAL_LM"
    base = save_gpt(tmp_path / "base") if is_language else save_bert(tmp_path / "base", BertModel)
    auto_class = f"AutoModelFor{'CausalLM' if is_language else 'SequenceClassification'}"
    options = {} if is_language else {"of_base": {"num_labels": 3}}
    saved = save_adapter(tmp_path / "adapter", base, auto_class, task_type=kind, **options)
    data = {"text": TEXTS["sentence"], "label": [0, 1, 2, 0] * 4}
    Dataset.from_dict(data).to_parquet(tmp_path / "x.parquet")
    model = load_model(str(tmp_path / "adapter"))
    data = DataOptions(str(tmp_path / "x.parquet"), batch_size=8)
    found, expected = (Objective(m, load_batches(data, model)) for m in (model, saved))
    assert found.names == expected.names and found.value() == pytest.approx(expected.value())
    again = Objective(load_model(str(tmp_path / "adapter")), found.batches)
    assert again.fingerprint() == found.fingerprint()
    BertTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter")).name_or_path == str(tmp_path / "adapter")


def test_adapters_that_cannot_be_measured_are_told(vit, bert, tmp_path, capsys, monkeypatch):
    headless = save_bert(tmp_path / "headless", BertModel)
    options = {"target_modules": ["query"]}
    save_adapter(tmp_path / "lost", headless, "AutoModelForSequenceClassification", **options)
    save_adapter(tmp_path / "tokens", bert, "AutoModel", task_type="TOKEN_CLS", **options)
    save_adapter(
        tmp_path / "moved", vit, "AutoModelForImageClassification", target_modules=["q_proj"]
    )
    file = tmp_path / "moved" / "adapter_config.json"
    config = json.loads(file.read_text())
    Dataset.from_dict(TEXTS).to_parquet(tmp_path / "x.parquet")

    def said(name):
        assert cli.main(["sharpness", str(tmp_path / name), str(tmp_path / "x.parquet")]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert f"nor its base {headless} holds classifier.bias" in said("lost")
    assert "is a TOKEN_CLS adapter, which is not supported" in said("tokens")
    file.write_text(json.dumps(config | {"base_model_name_or_path": "/no/base"}))
    assert "moved in the folder '/no/base'" in said("moved")
    file.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "has no base_model_name_or_path" in said("moved")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert said("moved").endswith("error: peft not installed: pip install peft")


def test_a_model_of_sentence_transformers_is_refused_with_the_way_out(tmp_path, capsys):
    folder = save_bert(tmp_path / "model", BertModel)
    (tmp_path / "model" / "modules.json").write_text("[]")
    for _ in range(2):
        assert cli.main(["sharpness", folder]) == 2
        told = "is a model of sentence-transformers, whose training loss is not saved with it: use "
        assert f"{told}sam_hf.diagnostics.Objective(" in capsys.readouterr().err
        (tmp_path / "model" / "config.json").unlink(missing_ok=True)


def test_each_number_has_its_uncertainty_and_its_meaning():
    measures = {
        "loss": 2.0,
        "worst_sharpness": 0.0123456,
        "worst_sharpness_error": 0.001,
        "average_sharpness": 1.9e-6,
        "average_sharpness_error": 1e-7,
        "share_norms": 0.25,
        "adaptive_worst_sharpness": math.inf,
        "adaptive_average_sharpness": -3e-6,
        "adaptive_share_biases": 0.5,
        "hessian_eigenvalue": 3.0,
        "hessian_eigenvalue_residual": 0.01,
        "hessian_eigenvalue_2": 1.0,
        "hessian_trace": math.nan,
        "gradient_noise": 4.0,
        "gradient_noise_scale": math.inf,
        "squared_gradient_norm": -0.5,
    }
    told = table(measures, {"rho": 0.05, "adaptive_rho": 0.5, "m": 8}, 24)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in told.splitlines()}
    noise = "unknown the squared gradient is below its noise: raise --examples"
    assert lines == {
        "loss": "2 mean loss of 24 examples",
        "worst_sharpness": "0.01235 ± 0.001 largest rise of the loss found within distance 0.05, "
        "mean over groups of 8",
        "average_sharpness": "about 0 below the rounding of the loss: raise --rho",
        "share_norms": "0.25 share of SAM's squared perturbation on norms",
        "adaptive_worst_sharpness": "not finite an overflow in the ball: lower --adaptive_rho",
        "adaptive_average_sharpness": "-3e-06 mean rise of the loss in random directions at "
        "distance 0.5 relative to the weights (ASAM)",
        "adaptive_share_biases": "0.5 share of ASAM's squared perturbation on biases",
        "hessian_eigenvalue": "3 ± 0.01 second derivative of the loss along its eigenvector",
        "hessian_eigenvalue_2": "1 second derivative of the loss along its eigenvector",
        "hessian_trace": "not finite an overflow in the derivatives",
        "gradient_noise": "4 trace of the covariance of the gradients of single examples",
        "gradient_noise_scale": noise,
        "squared_gradient_norm": noise,
    }

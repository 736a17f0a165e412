"""The documentation site is complete, its generated parts follow the code, and it builds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from sam_hf import SAMConfig
from sam_hf.config.checks import method_options
from sam_hf.methods import METHODS
from sam_hf.methods.gsam import GSAM

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_spec = importlib.util.spec_from_file_location("generated", DOCS / "_ext" / "generated.py")
generated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generated)

each_method = pytest.mark.parametrize("name", METHODS)


def page(docname: str) -> str:
    text = (DOCS / f"{docname}.md").read_text(encoding="utf-8")
    return generated.complete(docname, text)


def test_every_option_is_on_its_page_with_type_default_and_what_is_allowed():
    sections = page("reference/options").split("\n## ")
    for f in fields(SAMConfig):
        (section,) = (s for s in sections if s.startswith(f"`{f.name}`\n"))
        assert f"Default\n: `{f.default!r}`" in section
        assert "Type\n: `" in section and "Allowed\n: " in section
    assert "a number above 0 to 1" in generated.allowed("sam_ascent_fraction")
    assert "`micro_batch`" in generated.allowed("sam_scope")


def test_every_command_is_on_its_page():
    text = page("reference/commands")
    for command in ("sam-hf", "sam-hf sharpness", "sam-hf landscape", "sam-hf rho"):
        assert f"\n## {command}\n" in text
    assert "--directions {random,eigenvectors,between}" in text


@each_method
def test_the_card_of_a_method_has_usage_options_formula_cost_and_citation(name):
    generated.require_pages(DOCS)
    card = page(f"methods/{name}")
    assert card.startswith(f"# {METHODS[name].__name__}\n")
    assert f'SAMConfig(sam_method="{name}"' in card and METHODS[name].citation in card
    assert ".. math::" in card and "\n## When it does not help\n\n- " in card
    assert all(f"\n| `{key}` | `" in card for key in method_options(METHODS[name]))


@each_method
def test_the_configuration_on_a_card_is_allowed(name):
    line = next(x for x in page(f"methods/{name}").splitlines() if x.startswith("config = "))
    config = eval(line.removeprefix("config = "), {"SAMConfig": SAMConfig})
    assert config.sam_method == name


def test_passes_scopes_and_layouts_on_the_cards_are_those_of_the_methods():
    facts = {n: (generated.passes(n), generated.layouts(n), generated.scopes(n)) for n in METHODS}
    under_deepspeed = {n for n, (_, layouts, _) in facts.items() if "DeepSpeed" in layouts}
    assert under_deepspeed == {"sam", "asam", "friendly_sam", "vasso", "esam"}
    assert {n for n, (passes, _, _) in facts.items() if passes == "1"} == {"msam", "bilora", "bar"}
    assert facts["looksam"][0] == "1 + 1/5"
    assert {n for n, (_, _, scopes) in facts.items() if "micro_batch" in scopes} == under_deepspeed
    assert {n for n in METHODS if generated.needs_number(n)} == {"msam", "bilora", "bar"}


def test_a_method_without_a_page_or_without_its_limits_is_refused(monkeypatch):
    @dataclass(frozen=True)
    class New(GSAM):
        """A method that no page describes."""

    with pytest.raises(ValueError, match="When it does not help"):
        generated.card("gsam", "## Evidence\n")
    monkeypatch.setitem(METHODS, "new", New)
    with pytest.raises(FileNotFoundError, match=r"docs/methods/new\.md"):
        generated.require_pages(DOCS)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "sphinx_design"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d"]
    command += [str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "site")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    pages = [path.relative_to(DOCS) for path in DOCS.rglob("*.md")]
    assert len(pages) > 40
    for path in pages:
        assert (tmp_path / "site" / path.with_suffix(".html")).exists(), path
    card = (tmp_path / "site" / "methods" / "gsam.html").read_text(encoding="utf-8")
    assert 'class="math' in card and "<table" in card and "highlight-python" in card


def test_words_are_spelt_correctly():
    pytest.importorskip("codespell_lib")
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    files += [*DOCS.rglob("*.md"), *(ROOT / "sam_hf").rglob("*.py")]
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml")]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

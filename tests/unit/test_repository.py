"""The files for contributors, automation and citation are valid and agree with the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import sam_hf

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
each_workflow = pytest.mark.parametrize("name", [p.name for p in GITHUB.glob("workflows/*.yml")])


def load(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_all_configuration_is_valid_yaml():
    for path in [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert isinstance(load(path), dict), path


@each_workflow
def test_a_workflow_has_least_permissions_and_its_jobs_have_time_limits(name):
    workflow = load(GITHUB / "workflows" / name)
    assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        assert job.get("permissions", {}).keys() <= {"id-token", "pages"}  # to publish


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_an_issue_form_has_labelled_fields_with_ids_of_their_own(name):
    fields = load(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")["body"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_every_file_that_the_guide_and_the_workflows_name_exists():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = "".join(re.findall(r"```bash\n(.*?)```", guide, re.DOTALL))
    spans = re.findall(r"`([^`\n]+)`|\]\(([^:)]+)\)", re.sub(r"```.*?```", "", guide, flags=re.S))
    words = {w for text in [commands, *map("".join, spans)] for w in text.split()}
    paths = re.compile(r"(?!\.venv/)([\w.*-]*/[\w.*/-]*|[\w-]+\.(cff|md|py|toml|txt))")
    named = {w for w in words if paths.fullmatch(w)}
    assert len(named) > 20
    for path in GITHUB.glob("workflows/*.yml"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"\btests/[\w/.]+|\bconstraints[\w-]*\.txt", text))
    assert not [name for name in sorted(named) if not any(ROOT.glob(name))]


def test_the_citation_is_of_this_version():
    assert load(ROOT / "CITATION.cff")["version"] == sam_hf.__version__

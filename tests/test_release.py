"""The release: the workflow starts only when a maintainer asks, what its commands name exists, and versions agree."""

import importlib.util
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import moco
from moco.config import config_dir
from scripts.release_version import problems

ROOT = Path(config_dir()).parent
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
TRIGGERS = WORKFLOW[True]  # YAML 1.1 reads the key `on` as true
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
STEPS = [(name, step) for name, job in JOBS.items() for step in job["steps"]]
COMMANDS = [(name, line) for name, step in STEPS for line in step.get("run", "").splitlines()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def installed_by(job: str) -> str:
    """Return what a job installs, with the packages of the extras."""
    words = " ".join(line for name, line in COMMANDS if name == job and "pip install" in line)
    extras = [
        package for extra in re.findall(r"\.\[(\w+)\]", words) for package in PROJECT["optional-dependencies"][extra]
    ]
    return " ".join([words, *extras])


def test_it_starts_only_by_a_tag_or_by_hand() -> None:
    assert TRIGGERS == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}


def test_only_a_tag_publishes_and_only_after_all_checks() -> None:
    building = {"checks", "packages", "site", "image"}
    publishing = JOBS.keys() - building
    assert publishing == {"publish-site", "publish-packages"}
    for name in publishing:
        assert JOBS[name]["if"] == "github.event_name == 'push'"
        assert set(JOBS[name]["needs"]) == building
        assert JOBS[name]["environment"]  # where a maintainer can require an approval
    for name in building:  # except for the image, nothing may be written
        assert JOBS[name].get("permissions", {}).get("packages") == ("write" if name == "image" else None)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for _, step in STEPS:
        if re.search("push|login", f"{step.get('run', '')}{step.get('uses', '')}"):
            assert step["if"] == "github.event_name == 'push'"
    assert "secrets." not in str(JOBS["publish-packages"])  # trusted publishing


@pytest.mark.parametrize(("job", "line"), COMMANDS)
def test_what_a_command_names_exists(job: str, line: str) -> None:
    words = shlex.split(line)
    match words:
        case ["python" | "bin/python", "-m", "pip" | "venv" as module, *_]:
            assert importlib.util.find_spec(module)
        case ["python" | "bin/python", "-m", module, *_]:
            ours = module.startswith("moco.") and importlib.util.find_spec(module)
            assert ours or module in installed_by(job).split()
        case ["python" | "bash", script, *_]:
            assert (ROOT / script).is_file()
        case ["mkdocs", "build", "--strict"]:
            assert "mkdocs" in installed_by(job)
            assert (ROOT / "mkdocs.yml").is_file()
        case ["fresh/bin/pip", "install", "dist/*.whl"]:
            assert any(other == "python -m venv fresh" for name, other in COMMANDS if name == job)
        case ["docker", "build" | "run" | "tag" | "push", *_]:
            assert (ROOT / "Dockerfile").is_file()
        case _:
            pytest.fail(f"{line}: add a check for this command")


def test_the_steps_use_what_earlier_jobs_made() -> None:
    for name, job in JOBS.items():
        assert set(job.get("needs", [])) <= JOBS.keys(), name
        assert job["runs-on"] == "ubuntu-latest"
    uploaded = [step["with"]["name"] for _, step in STEPS if "upload-artifact@" in step.get("uses", "")]
    downloaded = [step["with"]["name"] for _, step in STEPS if "download-artifact@" in step.get("uses", "")]
    assert uploaded == downloaded == ["packages"]
    for _, step in STEPS:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()  # required by version 1.2.0
    assert citation["version"] == moco.__version__
    assert citation["license"] == PROJECT["license"]
    assert [each["name"] for each in citation["authors"]] == [each["name"] for each in PROJECT["authors"]]
    assert citation["keywords"] == PROJECT["keywords"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(each["url"] in readme for each in citation["references"])


def test_a_release_names_one_version_everywhere(tmp_path: Path) -> None:
    assert problems("refs/heads/main") == []
    assert any("CHANGELOG.md has no section" in each for each in problems(f"refs/tags/v{moco.__version__}"))
    for name in ("CITATION.cff", "CHANGELOG.md", "moco/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("## Unreleased", f"## {moco.__version__} (2027-01-01)"))
    assert problems(f"refs/tags/v{moco.__version__}", tmp_path) == []
    assert any("the tag is v9.0.0" in each for each in problems("refs/tags/v9.0.0", tmp_path))
    (tmp_path / "CITATION.cff").write_text("version: 9.0.0\n")
    assert any("CITATION.cff has version 9.0.0" in each for each in problems("refs/heads/main", tmp_path))

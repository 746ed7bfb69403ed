"""The Hugging Face Hub: files by the name `hf://USER/REPOSITORY`, and the upload of a folder that `to=hub` wrote."""

import re
from pathlib import Path
from typing import Any

from moco.config import ConfigError, require
from moco.config.base import HUB, REPOSITORY, optional_module
from moco.files import cause
from moco.models.backbones import BACKBONES, published_weights
from moco.runtime.retries import quiet_retries

WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"  # the names that the Hub and timm expect
_NAME = re.compile(rf"{HUB}(?P<repo>{REPOSITORY})(@(?P<revision>[\w./-]+?))?(/(?P<file>[^/@]+))?", re.ASCII)


def is_hub_folder(path: Path) -> bool:
    """Return whether a folder is a repository with weights, such as one that `to=hub` wrote, and not a run."""
    return (path / WEIGHTS).is_file() and not (path / "checkpoints").is_dir()


def local_file(name: str, field: str) -> Path:
    """Return the file that a name means: the name itself, model.safetensors of a repository's folder, or a download.

    Args:
        name: a path, or `hf://USER/REPOSITORY[@REVISION][/FILE]`. The library huggingface_hub downloads to its cache,
            and finds a file there if it was downloaded before.
        field: the field of the configuration that holds the name, for messages.

    Raises:
        ConfigError: if the name has another form or is that of a network, if the library is not installed, or if the
            file cannot be downloaded.
    """
    if not name.startswith(HUB):
        _refuse_network(name, field)
        return Path(name) / WEIGHTS if is_hub_folder(Path(name)) else Path(name)
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"{field}={name} is no name on the Hugging Face Hub: write hf://USER/REPOSITORY")
    library = optional_module("huggingface_hub", f"{field}={name}", "hub")
    repo, file = found["repo"], found["file"] or WEIGHTS
    try:
        with quiet_retries():
            return Path(library.hf_hub_download(repo, file, revision=found["revision"]))
    except Exception as error:  # of the library, of its HTTP client, or of the system
        raise ConfigError(f"{field}={name}: {_reason(error, repo, file)}") from error


def _refuse_network(name: str, field: str) -> None:
    """Refuse the name of a network in the place of a file, and name the file with its published weights."""
    of_timm, known = name.startswith("timm/"), name.removeprefix("timm/")
    if Path(name).exists() or not re.fullmatch(r"\w+", known.partition(".")[0]):
        return
    repo = published_weights(known)
    if not (of_timm or repo or known in BACKBONES):
        return
    backbone = f"{'model.' * (field == 'init_from')}backbone=timm/{known}"
    fix = f", such as {field}=hf://{repo} {backbone}, which downloads timm's weights" if repo else ""
    raise ConfigError(f"{field}={name} is the name of a network: name a file with its weights{fix}")


def _reason(error: Exception, repo: str, file: str) -> str:
    """Explain in a sentence why a download failed."""
    kinds = {each.__name__ for each in type(error).__mro__}  # by name: the library is not imported here
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        fix = "connect, or download it on another machine and name the file"
        return f"{file} was not downloaded before, and huggingface.co cannot be reached: {fix}"
    if "EntryNotFoundError" in kinds:
        return f"the repository has no file {file}: name one, hf://{repo}/FILE"
    if "GatedRepoError" in kinds:
        return f"its owner grants access on request: ask at huggingface.co/{repo}, then run: hf auth login"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private: check the name, or run: hf auth login"
    if "RevisionNotFoundError" in kinds:
        return "the repository has no such revision: check what follows the @"
    return f"the download failed ({cause(error)}): try again, or name a file that you downloaded"


def upload(folder: Path, repo: str, public: bool) -> str:
    """Upload the files that `to=hub` wrote, and no other files, to a repository. A missing repository is created.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: without the library or a login, for a public repository unless `public`, or if the upload fails.
    """
    library = optional_module("huggingface_hub", f"upload={repo}", "hub")
    again = f"{folder} is complete; to upload it, run the command again with overwrite=true"
    api: Any = library.HfApi()
    try:
        with quiet_retries():
            address = str(api.create_repo(repo, private=not public, exist_ok=True))
            private = bool(api.model_info(repo).private)
            problem = f"upload={repo} is a public repository: set public=true to upload to it. {again}"
            require(public or private, problem)
            message = "Upload an encoder written by moco.convert"
            api.upload_folder(
                repo_id=repo, folder_path=str(folder), allow_patterns=[WEIGHTS, SETTINGS, CARD], commit_message=message
            )
    except ConfigError:
        raise
    except Exception as error:
        login = "log in with: hf auth login." if _refused(error) else "is huggingface.co reachable?"
        raise ConfigError(f"upload={repo} failed ({cause(error)}): {login} {again}") from error
    return address


def _refused(error: Exception) -> bool:
    """Return whether the Hub denied access to this user."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError"

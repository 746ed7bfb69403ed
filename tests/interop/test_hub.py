"""Repositories of the Hugging Face Hub: the folder that `to=hub` writes, its upload, and names hf://USER/NAME."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from PIL import Image

import moco
from moco.config import ConfigError, TrainConfig
from moco.config.base import expand_paths
from moco.config.convert import ConvertConfig, check_convert
from moco.evaluation.subject import open_subject, weights_digest
from moco.interop import model_card
from moco.interop.convert import convert_encoder
from moco.interop.encoder_file import read_encoder, save_encoder
from moco.interop.hub import CARD, SETTINGS, WEIGHTS, local_file
from moco.interop.model_card import plain, shareable
from moco.methods.moco_config import MoCoConfig
from moco.runs.comparison import evaluated_on, placed
from tests.interop.networks import IMAGES, VIT, trained

HOSTILE = "a|b`c`\n# <script>alert(1)</script> [x](y) ``` end"


def encoder_file(
    path: Path, backbone: str = "convnet", options: dict[str, Any] | None = None, resize: int = 36, **data: Any
) -> Path:
    """Write the encoder.safetensors of a run of 32 px."""
    config = TrainConfig(method=MoCoConfig())
    config.model.backbone, config.model.options = backbone, options or {}
    config.augment.size, config.augment.eval_resize = 32, resize
    for name, value in data.items():
        setattr(config.data, name, value)
    path.parent.mkdir(exist_ok=True)
    save_encoder(path, trained(backbone, options), asdict(config), 7)
    return path


def folder_of(file: Path, output: Path, **fields: Any) -> Path:
    convert_encoder(ConvertConfig(checkpoint=str(file), to="hub", output=str(output), pictures=2, **fields))
    return output


@pytest.mark.parametrize(
    ("backbone", "options", "architecture"),
    [
        ("resnet18", {"zero_init_residual": True}, "resnet18"),
        ("timm/vit_tiny_patch16_224", VIT, "vit_tiny_patch16_224"),
        ("vit_small", {"img_size": 32}, "vit_small_patch16_224"),
    ],
)
def test_timm_builds_the_same_network(
    tmp_path: Path, backbone: str, options: dict[str, Any], architecture: str
) -> None:
    folder = folder_of(encoder_file(tmp_path / "run" / "e.safetensors", backbone, options), tmp_path / "hub")
    assert sorted(each.name for each in folder.iterdir()) == [CARD, SETTINGS, WEIGHTS]
    network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(network(IMAGES), trained(backbone, options)(IMAGES))
    assert json.loads((folder / SETTINGS).read_text())["architecture"] == architecture
    # images as moco prepares them
    data: Any = timm.data
    seen = data.resolve_model_data_config(network)
    assert (list(seen["input_size"]), list(seen["mean"])) == (
        [3, 32, 32],
        read_encoder(folder / WEIGHTS).images["mean"],
    )
    photo = Image.effect_noise((50, 70), 60).convert("RGB")
    ours, theirs = moco.load_encoder(folder).transform(photo), data.create_transform(**seen)(photo)
    assert (ours - theirs).abs().max() < 0.05  # about two gray levels: PIL rounds between its two passes
    # with a new classifier, as for fine-tuning
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)(IMAGES).shape == (2, 3)


@pytest.mark.parametrize(("size", "resize"), [(32, 36), (224, 256), (96, 96), (30, 49), (224, 248), (160, 183)])
def test_timm_resizes_to_the_same_side(tmp_path: Path, size: int, resize: int) -> None:
    from moco.interop.write import _crop_pct

    data: Any = timm.data
    transform = data.create_transform((3, size, size), crop_pct=_crop_pct(size, resize), interpolation="bilinear")
    assert transform.transforms[0].size == resize


def test_our_own_network_is_loaded_from_the_folder(tmp_path: Path) -> None:
    file = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2})
    folder = folder_of(file, tmp_path / "hub")
    assert "architecture" not in json.loads((folder / SETTINGS).read_text())
    encoder = moco.load_encoder(folder)
    assert torch.equal(encoder(IMAGES), trained("convnet", {"width": 2})(IMAGES))
    assert encoder.info["step"] == 7
    assert open_subject(ConvertConfig(checkpoint=str(folder))).file.weights.keys() == read_encoder(file).weights.keys()


# ---- the card ----


def test_the_card_has_the_results_of_these_weights_only(tmp_path: Path) -> None:
    file = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2})
    digest = weights_digest(read_encoder(file), "backbone")
    entry = {"command": "linear", "protocol": "sweep", "encoder": "pretrained", "data": {"name": HOSTILE}}
    entries = [
        entry | {"sha256": digest, "figures": {"top1": 50.0}},  # repeated below
        entry | {"sha256": digest, "changed": {"epochs": 2}, "figures": {"top1": 12.5}},
        entry | {"sha256": digest, "figures": {"top1": 51.25, "per_class": [1.0], "note": "x"}},
        entry | {"sha256": digest, "encoder": "untrained", "figures": {"top1": 22.0}},
        entry | {"sha256": "of other weights", "figures": {"top1": 99.9}},
    ]
    (file.parent / "results.json").write_text(json.dumps(entries))
    card = (folder_of(file, tmp_path / "hub") / CARD).read_text()
    rows = [line for line in card.splitlines() if line.startswith("| linear, sweep ")]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["top1 51.25", "top1 12.5", "top1 22"]
    assert rows[1].startswith("| linear, sweep (epochs=2) ")
    assert "<script>" not in card
    assert "[x](y)" not in card.partition("## Recipe")[0]
    assert len(card.splitlines()) == len(card.replace(HOSTILE, "").splitlines())
    front, _, rest = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["library_name"] == "moco"
    assert "USER/NAME" in rest

    (file.parent / "results.json").unlink()
    assert "None were recorded" in (folder_of(file, tmp_path / "without") / CARD).read_text()
    (file.parent / "results.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"results.json is damaged \(not a list of entries\)"):
        folder_of(file, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_the_recipe_in_the_card_is_valid_yaml_and_cannot_end_its_block(tmp_path: Path) -> None:
    file = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2}, subset=HOSTILE)
    card = (folder_of(file, tmp_path / "hub") / CARD).read_text()
    fence = "`" * 4
    recipe = yaml.safe_load(card.partition(f"{fence}yaml\n")[2].partition(f"\n{fence}\n")[0])
    assert recipe["data"]["subset"] == HOSTILE
    assert recipe["augment"]["size"] == 32


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b|c\\", r"a\_b\|c\\"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("two\nlines\u202e\x00", "two lines"),
        ("https://host", r"https\://host"),
    ],
)
def test_text_is_shown_literally(text: str, escaped: str) -> None:
    assert plain(text) == escaped


def test_nothing_of_the_machine_is_shared(tmp_path: Path) -> None:
    file = encoder_file(
        tmp_path / "run" / "e.safetensors",
        options={"width": 2},
        name="folder",
        root="/home/jane/photos",
        eval_root="~j/x",
    )
    folder = folder_of(file, tmp_path / "hub")
    for each in folder.iterdir():
        for private in (b"jane", b"~j", str(tmp_path).encode()):
            assert private not in each.read_bytes(), each
    assert "| data | folder photos |" in (folder / CARD).read_text()


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ("/data/imagenet/", "imagenet"),
        ("~/x/y.txt", "y.txt"),
        ("runs/mine", "runs/mine"),
        ("timm/vit_tiny", "timm/vit_tiny"),
        ("https://user:secret@host/a.tar", ""),
        ("pipe:curl -H 'token'", ""),
        ("hf://me/mine", "hf://me/mine"),
        ([{"a": "/b/c"}, 1, None, True], [{"a": "c"}, 1, None, True]),
    ],
)
def test_what_a_configuration_shares(value: Any, shared: Any) -> None:
    assert shareable(value) == shared


# ---- the folder ----


def test_overwrite_replaces_only_the_three_files(tmp_path: Path) -> None:
    file, folder = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2}), tmp_path / "hub"
    folder.mkdir()
    folder_of(file, folder)  # an empty folder
    (folder / ".gitattributes").write_text("dear")
    with pytest.raises(ConfigError, match="exists: choose another, or set overwrite=true"):
        folder_of(file, folder)
    (folder / CARD).write_text("old")
    folder_of(file, folder, overwrite=True)
    assert (folder / CARD).read_text() != "old"
    assert (folder / ".gitattributes").read_text() == "dear"
    with pytest.raises(ConfigError, match="is the source file"):
        folder_of(folder, folder, overwrite=True)
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        folder_of(file, file, overwrite=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output": ""}, "output='' must name a folder for to=hub"),
        ({"upload": "mine"}, "upload='mine' must be USER/NAME"),
        ({"upload": "https://huggingface.co/me/mine"}, "must be USER/NAME"),
        ({"upload": "../x"}, "must be USER/NAME"),
        ({"public": True}, "public=true needs upload"),
        ({"to": "onnx", "output": "x.onnx", "upload": "me/mine"}, "upload=me/mine needs to=hub, not to=onnx"),
    ],
)
def test_invalid_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    check_convert(ConvertConfig(run="r", to="hub", output="mine", upload="me/mine", public=True))
    with pytest.raises(ConfigError, match=words):
        check_convert(ConvertConfig(**({"run": "r", "to": "hub", "output": "x"} | fields)))


# ---- the upload ----


class Api:
    """Stands for `huggingface_hub.HfApi`: records calls."""

    def __init__(self, visible: bool = False, error: Exception | None = None) -> None:
        self.visible, self.error, self.calls = visible, error, list[tuple[str, dict[str, Any]]]()

    def __call__(self) -> "Api":
        return self

    def create_repo(self, repo_id: str, **fields: Any) -> str:
        if self.error:
            raise self.error
        self.calls.append(("create", {"repo_id": repo_id} | fields))
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=not self.visible)

    def upload_folder(self, **fields: Any) -> None:
        self.calls.append(("upload", fields))


def test_nothing_is_uploaded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    file = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2})
    folder_of(file, tmp_path / "hub")
    assert api.calls == []
    folder = folder_of(file, tmp_path / "new", upload="me/mine")
    (_, created), (_, sent) = api.calls
    assert created == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", str(folder))
    assert sorted(sent["allow_patterns"]) == sorted(each.name for each in folder.iterdir())
    card = (folder / CARD).read_text()
    assert "# mine\n" in card
    assert 'load_encoder("hf://me/mine")' in card


def test_a_public_repository_needs_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(visible=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    file = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2})
    with pytest.raises(ConfigError, match=r"upload=me/mine is a public repository: set public=true .*overwrite=true"):
        folder_of(file, tmp_path / "hub", upload="me/mine")
    assert [name for name, _ in api.calls] == ["create"]
    folder_of(file, tmp_path / "hub", upload="me/mine", public=True, overwrite=True)
    assert [name for name, _ in api.calls] == ["create", "create", "upload"]
    assert api.calls[1][1]["private"] is False


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (huggingface_hub.errors.LocalTokenNotFoundError("no token"), r"\(no token\): log in with: hf auth login"),
        (ConnectionError("no route"), r"\(no route\): is huggingface.co reachable"),
    ],
)
def test_a_failed_upload_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api(error=error))
    file = encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2})
    with pytest.raises(ConfigError, match=f"upload=me/mine failed {words}.* hub is complete|{words}"):
        folder_of(file, tmp_path / "hub", upload="me/mine")
    assert (tmp_path / "hub" / WEIGHTS).is_file()


# ---- names on the Hub ----


def test_a_name_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(encoder_file(tmp_path / "run" / "e.safetensors", options={"width": 2}), tmp_path / "hub")
    asked: list[tuple[str, str, str | None]] = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(folder / WEIGHTS)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    encoder = moco.load_encoder("hf://me/my.enc")
    assert torch.equal(encoder(IMAGES), trained("convnet", {"width": 2})(IMAGES))
    local_file("hf://me/mine@v1.0", "checkpoint")
    local_file("hf://me/mine@refs/pr/1/a.pth", "checkpoint")
    local_file("hf://me/mine/b.safetensors", "checkpoint")
    assert asked == [
        ("me/my.enc", WEIGHTS, None),
        ("me/mine", WEIGHTS, "v1.0"),
        ("me/mine", "a.pth", "refs/pr/1"),
        ("me/mine", "b.safetensors", None),
    ]
    # results go to a folder of one's own, not into the library's cache
    assert open_subject(ConvertConfig(checkpoint="hf://me/mine")).output == Path("runs/mine")


@pytest.mark.parametrize(
    "name", ["hf://", "hf://me", "hf://me/", "hf:///x", "hf://me/a b", "hf://me/x/../../y", "hf://-/x"]
)
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint=hf://.* is no name .*: write hf://USER/REPOSITORY"):
        local_file(name, "checkpoint")


def test_without_a_network_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"init_from=hf://nobody/nothing: model\.safetensors was not downloaded"):
        local_file("hf://nobody/nothing", "init_from")


def test_without_the_library_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="checkpoint=hf://me/mine needs huggingface-hub: pip install huggingface-hub"):
        local_file("hf://me/mine", "checkpoint")


def test_only_fields_of_an_encoder_accept_such_a_name() -> None:
    config = ConvertConfig(checkpoint="hf://me/mine")
    expand_paths(config)
    expand_paths(TrainConfig(method=MoCoConfig(), init_from="hf://me/mine"))
    config.output = "hf://me/mine"
    with pytest.raises(ConfigError, match="output=hf://me/mine is an address"):
        expand_paths(config)


def test_the_card_names_the_folders_of_an_evaluation() -> None:
    data = {"name": "folder", "root": "/home/me/train", "more_roots": ["/home/me/scans"], "eval_root": "/home/me/test"}
    shared = model_card.shareable(data)
    assert evaluated_on(shared) == "folder train scans, held out: test"
    assert evaluated_on({"name": "folder", "root": "a/b", "hold_out": 0.2}) == "folder a/b, held out: 0.2 of them"
    assert evaluated_on({"root": "shapes", "hold_out": 0.2}) == "shapes, held out: 0.2 of them"  # moco.segment
    cifar = {"name": "cifar10", "root": "/data", "held_out_in_training": 3}
    copies = "3 held-out images are copies of training images"
    assert evaluated_on(cifar) == f"cifar10 ({copies})"
    seen = evaluated_on(cifar | {"held_out_seen": True})
    assert seen == f"cifar10 (held-out images were in the training set, without labels; {copies})"


def test_the_card_numbers_different_data_of_one_name() -> None:
    roots = [("/a/train", "/a/test"), ("/b/train", "/b/test"), ("/a/train", "/b/test"), ("/a/train", "/a/test")]
    entries = [{"data": {"name": "folder", "root": root, "eval_root": test}} for root, test in roots]
    assert [each.data for each in placed(entries, model_card.shareable)] == [
        "folder train, held out: test",
        "folder train, held out: test (other eval_root, root)",
        "folder train, held out: test (other eval_root)",
    ]

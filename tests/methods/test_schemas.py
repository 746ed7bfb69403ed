"""The schemas of the methods: configurations of older runs, fields of other methods, and no import of torch."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moco.config import ConfigError, TrainConfig
from moco.methods import METHODS, read_method
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3_config import MoCoV3Config
from moco.methods.simclr_config import SimCLRConfig
from moco.runs.directory import refuse_difference

# The group `method` as version 0.1 saved it, with the fields of all methods, for a run of SimCLR.
OLD: dict[str, Any] = {
    "name": "simclr",
    "queue_size": 0,
    "queue_start": "random",
    "mask_own_keys": True,
    "temperature": 0.5,
    "momentum": 0.0,
    "momentum_end": None,
    "symmetric": False,
    "reduction": "mean",
    "candidates": "all",
    "contrast_mode": "all",
    "margin": 0.0,
    "debias": 0.0,
    "mix_hardest": 0,
}


def test_fields_of_other_methods_in_an_old_configuration_are_dropped() -> None:
    assert read_method(OLD) == SimCLRConfig(temperature=0.5)
    v3 = {**OLD, "name": "moco_v3", "momentum": 0.99, "momentum_end": 1.0, "symmetric": True, "reduction": "sum"}
    assert read_method(v3) == MoCoV3Config(temperature=0.5, momentum=0.99, momentum_end=1.0)
    assert read_method({**OLD, "name": "moco", "queue_size": 64}).queue_size == 64
    with pytest.raises(ConfigError, match=r"method\.name='byol'"):
        read_method({"name": "byol"})


def test_an_old_run_resumes_unless_a_field_of_its_method_differs(tmp_path: Path) -> None:
    there = asdict(TrainConfig()) | {"method": OLD}
    refuse_difference(tmp_path, there, asdict(TrainConfig(method=SimCLRConfig(temperature=0.5))))
    with pytest.raises(ConfigError, match=r"method\.temperature \(there 0\.5, now 0\.4\)"):
        refuse_difference(tmp_path, there, asdict(TrainConfig(method=SimCLRConfig(temperature=0.4))))
    with pytest.raises(ConfigError, match=r"holds a run with another configuration: method\."):
        refuse_difference(tmp_path, there, asdict(TrainConfig(method=MoCoConfig())))


@pytest.mark.parametrize("name", METHODS)
def test_a_schema_has_the_name_of_its_method(name: str) -> None:
    assert METHODS[name]().name == name


def test_the_schemas_do_not_import_torch() -> None:
    code = "import sys, moco.cli, moco.config, moco.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=moco_v3", "method.margin=0.1"], r"method\.margin is not a field of moco_v3"),
        (["method=simclr", "method.base_temperatur=0.1"], r"did you mean 'method\.base_temperature'"),
        (["experiment=cifar10_cpu", "method=simclr"], r"method\.queue_size is not a field of simclr; the recipe"),
        (["method.name=simclr"], r"method\.name='simclr'"),
    ],
)
def test_a_field_of_another_method_is_refused(
    overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moco.cli import run_command

    monkeypatch.setattr(sys, "argv", ["moco.train", *overrides])
    with pytest.raises(SystemExit, match="2"):
        run_command("train", TrainConfig, lambda config: None)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(words, error), error

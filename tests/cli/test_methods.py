"""Every method: training with micro-batches, exact resume, and all that follows with its checkpoint."""

import shutil
from pathlib import Path

import pytest

from moco.digest import digest
from moco.interop.encoder_file import save_encoder
from moco.runs import checkpoint
from tests.cli.conftest import Run
from tests.interop.networks import LOOK, trained

SMALL = [
    *("epochs=2", "batch_size=128", "accumulate=2", "model.options={width:2}", "model.head_hidden=16", "model.dim=8"),
    *("precision=fp32", "device=cpu", "threads=1", "optim.warmup_epochs=0", "log_every=5", "analyse_every=1"),
    *("evaluate.every_epochs=2", "evaluate.draws=2", "checkpoint.keep_last=9"),
]
TEACHER = ["experiment=distill_digits", "method.teacher=teacher.safetensors"]
DENSE = ["experiment=densecl_digits", "method.queue_size=200"]
METHODS = {
    "densecl": [*DENSE, "method.dense_warmup_steps=3", "evaluate.online_probe=true"],
    "densecl by crops": [*DENSE, "method.correspondence=crops"],
    "distill": TEACHER,
    "seed": [*TEACHER, "method=seed", "method.queue_size=200"],
    "moco with small views": ["experiment=digits", "augment.small_views=2", "augment.small_size=12"],
    "nnclr": ["experiment=nnclr_digits", "method.queue_size=200"],
    "ressl": ["experiment=ressl_digits", "method.queue_size=200"],
}


def final_state(run: str) -> tuple[int, str, str]:
    state = checkpoint.load(checkpoint.list_checkpoints(Path(run) / "checkpoints")[0])
    return state["step"], digest(state["method"]), digest(state["optimizer"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=[pytest.mark.long] * (each in ("densecl", "seed", "nnclr", "ressl")))
        for each in METHODS
    ],
)
def test_a_run_trains_resumes_and_is_evaluated_reported_and_converted(name: str, run: Run) -> None:
    about = {
        "model": {"backbone": "convnet", "options": {"width": 1}},
        "augment": LOOK | {"size": 16, "eval_resize": 0},
    }
    save_encoder(Path("teacher.safetensors"), trained("convnet", {"width": 1}), about, 1)  # of 8 features
    status, out, err = run("train", *METHODS[name], *SMALL, "run=full")
    assert status == 0, err
    assert "nan" not in out
    shutil.copytree("full", "cut")
    for file in checkpoint.list_checkpoints(Path("cut/checkpoints"))[:-1]:
        file.unlink()
    assert checkpoint.step_of(checkpoint.list_checkpoints(Path("cut/checkpoints"))[0]) == 10
    status, _, err = run("train", *METHODS[name], *SMALL, "run=cut")
    assert status == 0, err
    assert final_state("cut") == final_state("full")
    assert final_state("cut")[0] == 20

    status, out, err = run("linear", "run=full", "epochs=1", "compare=[untrained]")
    assert status == 0, err
    assert "untrained" in out
    status, _, err = run("report", "run=full")
    assert status == 0, err
    assert "full" in Path("full/report.html").read_text()
    status, out, err = run("convert", "run=full", "to=safetensors", "output=x.safetensors")
    assert status == 0, err
    assert "differ by 0 at most" in out

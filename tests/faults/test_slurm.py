"""The launch scripts with fake srun, scontrol and torchrun: which jobs are requeued, and which variables are read."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.runs import REPOSITORY

# Training that marks its start, saves on SIGTERM, and ends as torchrun does.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
trap 'sleep 0.3; echo saved >> calls; exit STATUS' TERM
touch begun
for _ in $(seq 200); do [[ -f end ]] && exit "$(cat end)"; sleep 0.05; done
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo node7; sleep 0.1; echo node8; else echo "scontrol $*" >> calls; fi
"""


def submit(folder: Path, at_the_end: int = 1) -> "subprocess.Popen[bytes]":
    for name, text in (("srun", SRUN.replace("STATUS", str(at_the_end))), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"NNODES": "2", "JOB_NODELIST": "node[7-8]", "JOB_ID": "4711", "CPUS_PER_TASK": "3"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    script = REPOSITORY / "scripts" / "train_slurm.sbatch"
    job = subprocess.Popen(["bash", str(script), "epochs=3", "run=a b"], cwd=folder, env=os.environ | environment)
    until = time.monotonic() + 20
    while not (folder / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return job


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


STARTED = "srun --cpus-per-task=3 bash scripts/train_multi_node.sh epochs=3 run=a b"


def test_near_its_time_limit_the_job_saves_and_is_then_requeued(tmp_path: Path) -> None:
    job = submit(tmp_path)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1
    assert calls(tmp_path) == [STARTED, "saved", "scontrol requeue 4711"]


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_job_that_ends_before_the_limit_is_not_requeued(status: int, tmp_path: Path) -> None:
    job = submit(tmp_path)
    (tmp_path / "end").write_text(str(status))
    assert job.wait(20) == status
    assert calls(tmp_path) == [STARTED]


def test_a_job_that_finishes_after_the_signal_is_not_requeued(tmp_path: Path) -> None:
    """The signal comes in the last step."""
    job = submit(tmp_path, at_the_end=0)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert calls(tmp_path) == [STARTED, "saved"]


@pytest.mark.parametrize(
    "variables",
    [
        {"NODE_RANK": "1", "MASTER_ADDR": "node7"},
        {"RANK": "1", "MASTER": "node7"},  # the former names
        {"SLURM_NODEID": "1", "MASTER_ADDR": "node7"},
        {"NODE_RANK": "1", "RANK": "0", "MASTER_ADDR": "node7", "MASTER": "node8"},
    ],
)
def test_the_multi_node_script_reads_node_rank_and_address(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR")}
    environment |= variables | {"NODES": "2", "GPUS": "1", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = str(REPOSITORY / "scripts" / "train_multi_node.sh")
    printed = subprocess.run(["bash", script, "epochs=3"], env=environment, capture_output=True, text=True, check=True)
    words = printed.stdout.split()
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29500"
    assert "is_host=0" in words
    assert words[-3:] == ["-m", "moco.train", "epochs=3"]


@pytest.mark.parametrize("name", ["train_single_node.sh", "train_multi_node.sh"])
def test_without_a_gpu_the_scripts_name_the_variable_to_set(name: str, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    variables = {"NODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "here", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = {name: value for name, value in os.environ.items() if name != "GPUS"} | variables
    script = str(REPOSITORY / "scripts" / name)
    ended = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "set GPUS to the number of processes" in line


@pytest.mark.parametrize(
    ("name", "variables", "wanted"),
    [
        ("train_multi_node.sh", {"NODES": "2", "MASTER_ADDR": "here"}, "NODE_RANK=: set it to the number of"),
        ("train_multi_node.sh", {"NODES": "2", "NODE_RANK": "one", "MASTER_ADDR": "here"}, "NODE_RANK=one: set it"),
        ("train_multi_node.sh", {"NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ("train_multi_node.sh", {"NODE_RANK": "0", "MASTER_ADDR": "here"}, "NODES=: set it to the number of machines"),
        ("train_slurm.sbatch", {}, "submit the script with sbatch"),
        ("evaluate.sh", {}, "the directory of the run is missing"),
    ],
)
def test_what_a_script_lacks_is_one_sentence(name: str, variables: dict[str, str], wanted: str) -> None:
    environment = {"PATH": os.environ["PATH"]} | variables
    script = str(REPOSITORY / "scripts" / name)
    ended = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(wanted) or wanted in line.partition(": ")[2]


def test_every_script_has_valid_shell_syntax() -> None:
    scripts = [*(REPOSITORY / "scripts").glob("*.sh"), *(REPOSITORY / "scripts").glob("*.sbatch")]
    assert len(scripts) >= 4
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)

"""Training on an emulated CUDA device: results, waits of the host, number types, races between streams.

The CPU computes all kernels, so the rounding and the speed of a GPU are not tested.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.canvases import write_canvases
from tests.interpreter import needs_interpreter
from tests.rehearsal import build, commands
from tests.rehearsal.run import STEPS, Job, Record

SMALL = "batch_size=32 model.bn_group_size=8"
FLOAT32 = {("convolution", "float32"), ("product", "float32")}
# The host may wait for the previous step: `NonFiniteGuard` reads its loss, `DelayedMaxOverRanks` the reasons to stop.
LATE = ("moco/training/nonfinite.py", "moco/distributed.py")
RANKED = ("duplicates.json", "nearest.json", "outliers.json")  # of moco.search
pytestmark = pytest.mark.skipif(build.missing() != "", reason=build.missing())


def in_autocast(dtype: str) -> set[tuple[str, str]]:
    return {("convolution", dtype), ("product", dtype), ("product", "float32")}  # the loss is in float32


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("stand_in"))


def job(
    recipe: str,
    device: str = "cuda",
    fault: str = "",
    kernels: bool = False,
    steps: int = STEPS,
    dtype: str = "float32",
) -> Job:
    return Job(recipe=recipe, device=device, fault=fault, kernels=kernels, steps=steps, dtype=dtype)


def rehearse(library: Path, folder: Path, jobs: list[Job], processes: int = 1, **environment: str) -> list[Record]:
    folder.mkdir(exist_ok=True)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    words = [*(launcher if processes > 1 else []), "tests.rehearsal.run", str(folder), json.dumps(jobs)]
    command = [sys.executable, "-m", *words]
    env = build.environment(library, processes) | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    records: list[Record] = torch.load(folder / "records.pt", weights_only=False)
    return records


def waits(record: Record) -> list[str]:
    """Return the places where the host waits in the third step and later."""
    late = [wait for wait, _ in record["waits"] if wait[0] == "event" and wait[1].startswith(LATE)]
    steady = [wait for wait, _ in record["waits"] if 2 <= wait[2] < record["job"]["steps"] and wait not in late]
    return sorted({f"the host waits ({kind}): {line}" for kind, line, _ in steady})


def differences(record: Record, reference: Record, rtol: float, atol: float) -> list[str]:
    """Return what differs from a reference: the measures of each step, and the state after the last step."""
    taken, wanted = len(record["measures"]), record["job"]["steps"]
    found = [] if taken == wanted else [f"{taken} steps instead of {wanted}"]
    pairs = [("after the last step", record["state"], reference["state"])]
    pairs += [
        (f"step {n}", *each) for n, each in enumerate(zip(record["measures"], reference["measures"], strict=False))
    ]
    for where, ours, theirs in pairs:
        found += [f"{where}: {name} is missing" for name in theirs.keys() - ours.keys()]
        for name in theirs.keys() & ours.keys():
            if not torch.allclose(ours[name].double(), theirs[name].double(), rtol, atol, equal_nan=True):
                found.append(f"{where}: {name} differs by {(ours[name] - theirs[name]).abs().max():.3g}")
    return found


def problems(record: Record, reference: Record | None = None, products: set[tuple[str, str]] = FLOAT32) -> list[str]:
    """Return all problems of a rehearsed training run; empty if there are none."""
    found = [record["error"]] if record["error"] else []
    found += waits(record)
    found += [f"{operation} in {dtype}" for operation, dtype in sorted(record["products"] - products)]
    found += [f"no {operation} in {dtype}" for operation, dtype in sorted(products - record["products"])]
    return found + (differences(record, reference, 1e-5, 2e-6) if reference else [])


def check_recipes(library: Path, folder: Path, recipes: list[str]) -> None:
    recipes = [f"{recipe} {SMALL} precision=fp32" for recipe in recipes]
    records = rehearse(library, folder, [job(recipe, device) for recipe in recipes for device in ("cuda", "cpu")])
    found = zip(recipes, records[::2], records[1::2], strict=True)
    assert {recipe: problems(cuda, cpu) for recipe, cuda, cpu in found} == {key: [] for key in recipes}


@pytest.mark.slow
def test_steps_on_the_device_equal_those_on_the_cpu_and_wait_for_nothing(library: Path, tmp_path: Path) -> None:
    check_recipes(library, tmp_path, ["digits", "moco_v3_digits", "simclr_digits"])


@needs_interpreter
@pytest.mark.long
def test_kernels_compute_the_same_steps(library: Path, tmp_path: Path) -> None:
    view = dict(jitter_p=1, brightness=0.4, contrast=0.4, hue=0.1, blur_p=0.5, solarize_p=0.5, crop_scale="[0.5,1]")
    fields = [f"augment.{name}={value}" for name, value in view.items()]
    recipe = " ".join(["digits", SMALL, "batch_size=16 channels_last=true precision=fp32", *fields])
    fused, plain = rehearse(library, tmp_path, [job(recipe, kernels=True), job(recipe, "cpu")])
    assert problems(fused, plain) == []
    views = {"_resize", "_gray_sums", "_color", "_blur_rows", "_blur_columns"}
    norm = {"_moments", "_normalize", "_gradient_sums", "_gradients"}
    assert fused["kernels"] == views | norm | {"_parts", "_combine"}


@pytest.mark.slow
def test_a_graph_repeats_the_passes(library: Path, tmp_path: Path) -> None:
    """The first of four steps is computed as usual, the second is captured; batch and shuffles change in each."""
    recipe = f"digits {SMALL} precision=fp32"
    faults = ["", "graph of one batch", "item"]
    jobs = [job(recipe, "cpu"), *(job(f"{recipe} cuda_graph=true", fault=fault) for fault in faults)]
    plain, graph, stale, waiting = rehearse(library, tmp_path, jobs)
    assert problems(graph, plain) == []
    assert problems(stale, plain) != []
    assert "cannot be captured" in waiting["error"]


COMPILED = [
    "digits accumulate=2",
    "digits augment.small_views=2 augment.small_size=8",
    "moco_v3_digits",
    "distill_digits",
]


def check_compiled(record: Record) -> None:
    """Check that all compilations were in the first step, outside of a capture."""
    assert record["error"] == ""
    assert record["graph_breaks"] == []
    assert record["compilations"], record["job"]
    assert set(record["compilations"]) == {(0, False)}, record["job"]


@pytest.mark.slow
def test_a_graph_repeats_compiled_networks(library: Path, tmp_path: Path) -> None:
    """A graph repeats the last 9 of 12 steps; both views update the running statistics in it."""
    recipe = f"digits method.symmetric=true {SMALL} precision=fp32"
    graph, fault = f"{recipe} compile=true cuda_graph=true", "no step before the capture"
    jobs = [
        job(recipe, "cpu", steps=12, dtype="float64"),
        job(graph, steps=12, dtype="float64"),
        job(graph, fault=fault),
    ]
    plain, compiled, late = rehearse(library, tmp_path, jobs)
    check_compiled(compiled)
    assert differences(compiled, plain, 1e-6, 1e-7) == []
    assert "cannot be captured" in late["error"] or (0, True) in late["compilations"]  # torch 2.11 does not refuse


@pytest.mark.long
@pytest.mark.parametrize("recipe", COMPILED)
def test_graphs_of_other_compiled_networks(library: Path, tmp_path: Path, recipe: str) -> None:
    """Bit for bit: the differences to the CPU grow with the steps in some recipes, also without compiler and graph."""
    recipe = f"{recipe} {SMALL} precision=fp32 compile=true"
    jobs = [job(f"{recipe} cuda_graph=true", steps=12), job(recipe, steps=12)]
    graph, launched = rehearse(library, tmp_path, jobs)
    check_compiled(graph)
    assert differences(graph, launched, 0, 0) == []


@pytest.mark.long
def test_a_graph_repeats_compiled_networks_on_two_ranks(library: Path, tmp_path: Path) -> None:
    recipe = f"digits {SMALL} precision=fp32"
    graph = job(f"{recipe} compile=true cuda_graph=true", steps=12, dtype="float64")
    (compiled,) = rehearse(library, tmp_path / "two", [graph], 2)
    (plain,) = rehearse(library, tmp_path / "one", [job(recipe, "cpu", steps=12, dtype="float64")])
    check_compiled(compiled)
    assert differences(compiled, plain, 1e-6, 1e-7) == []


@pytest.mark.long
def test_other_methods(library: Path, tmp_path: Path) -> None:
    check_recipes(
        library, tmp_path, ["densecl_digits", "nnclr_digits", "ressl_digits", "distill_digits", "supmoco_digits"]
    )


@pytest.mark.long
def test_graphs_of_other_steps(library: Path, tmp_path: Path) -> None:
    variants = ["accumulate=2", "augment.small_views=2 augment.small_size=8", "method.symmetric=true optim=lars_cosine"]
    methods = ["moco_v3", "simclr", "densecl", "nnclr", "ressl", "distill", "supmoco"]
    recipes = [*(f"digits {each}" for each in variants), *(f"{each}_digits" for each in methods)]
    recipes = [f"{recipe} {SMALL} precision=fp32" for recipe in recipes]
    jobs = [each for recipe in recipes for each in (job(f"{recipe} cuda_graph=true"), job(recipe, "cpu"))]
    records = rehearse(library, tmp_path, jobs)
    found = zip(recipes, records[::2], records[1::2], strict=True)
    assert {recipe: problems(graph, cpu) for recipe, graph, cpu in found} == {recipe: [] for recipe in recipes}


@pytest.mark.long
def test_variants_of_the_step(library: Path, tmp_path: Path) -> None:
    switches = "digits_switches method.margin=0.1 method.mix_hardest=64 method.mix_pairs=16"
    more = [
        "accumulate=2",
        "augment.small_views=2 augment.small_size=8",
        "method.symmetric=true",
        "optim=lars_cosine",
        "method.temperature_schedule=learned",
    ]
    check_recipes(library, tmp_path, [*(f"digits {each}" for each in more), switches, "supcon_digits"])


@pytest.mark.long
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast(library: Path, tmp_path: Path, precision: str, dtype: str) -> None:
    recipe = f"digits {SMALL} precision="
    half, single = rehearse(library, tmp_path, [job(recipe + precision), job(recipe + "fp32", "cpu")])
    for ours, theirs in zip(half["measures"], single["measures"], strict=True):
        assert ours["loss"].dtype == torch.float32
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=2e-3, atol=0)
    found = problems(half, products=in_autocast(dtype))
    # fp16's scaler skips steps: the host waits for every gradient
    assert [each for each in found if precision == "bf16" or "_check_finite" not in each] == []


@pytest.mark.long
def test_commands_give_the_results_of_the_cpu(library: Path, tmp_path: Path) -> None:
    """All commands that compute on a GPU; `moco.convert` refuses one."""
    write_canvases(tmp_path / "canvases", 12, 3, side=32)
    for device in ("cuda", "cpu"):
        words = [*commands.on(tmp_path, device), *commands.others_on(tmp_path, device)]
        command = [sys.executable, "-m", "tests.rehearsal.commands", "cuda", json.dumps(words)]
        env = build.environment(library)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ours, theirs = (commands.results(tmp_path / device) for device in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"results.json", *RANKED, "choose.json", "temperature.json"}
    # Images of the same similarity, to rounding, may change places.
    compared = [name for name in theirs if not (name.startswith(RANKED) and name.endswith("/row"))]
    assert [ours[name] for name in compared] == [pytest.approx(theirs[name], rel=1e-3) for name in compared]


@pytest.mark.slow
def test_trainings_on_labels_wait_for_no_step(library: Path, tmp_path: Path) -> None:
    """With twice as many steps, the host waits only where it reads the values of the previous step."""
    write_canvases(tmp_path / "canvases", 12, 3, side=32)
    made = Path(f"{tmp_path}/canvases")
    run = f"run={tmp_path}/run device=cuda threads=1"
    train = (
        f"train experiment=digits epochs=1 optim.warmup_epochs=0 evaluate.every_epochs=0 logger=[] precision=fp32 {run}"
    )
    finetune = f"finetune seeds=1 epochs=1 fraction=0.1 batch_size=64 log_every=100 {run}"
    linear = f"linear protocol=moco_v2 epochs=1 seeds=1 official.schedule=constant augment.flip_p=0.5 {run}"
    segment = (
        f"segment masks.root={made}/train masks.eval_root={made}/test masks.workers=0 crop=16 batch_size=4 lr=0.01"
    )
    segment += f" log_every=100 encoders=[pretrained] {run}"
    pairs = [(f"{finetune} min_steps=4", f"{finetune} min_steps=8")]
    pairs += [(f"{linear} batch_size=256", f"{linear} batch_size=128")]
    pairs += [(f"{segment} steps=4", f"{segment} steps=8 output={tmp_path}/again")]
    words = json.dumps([train, *(each for pair in pairs for each in pair)])
    command = [sys.executable, "-m", "tests.rehearsal.commands", "cuda", words]
    env = build.environment(library)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counted = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][1:]
    assert len(counted) == 6
    for (few, _), short, long in zip(pairs, counted[::2], counted[1::2], strict=True):
        more = {line: count - short.get(line, 0) for line, count in long.items() if count > short.get(line, 0)}
        assert [line for line in more if not line.startswith("event: moco/distributed.py")] == [], few


@pytest.mark.slow
def test_streams_do_not_race_and_a_missing_wait_would_be_found(library: Path, tmp_path: Path) -> None:
    recipe = f"digits {SMALL}"
    jobs = [job(recipe), job(recipe, fault="no wait for the batch")]
    right, wrong = rehearse(library, tmp_path, jobs, REHEARSAL_SANITIZE="1")
    assert problems(right) == []
    assert wrong["error"].startswith("CUDASanitizerErrors")


@pytest.mark.slow
def test_planted_faults_are_found(library: Path, tmp_path: Path) -> None:
    messages = {
        "host tensor": "tensors on cuda and on cpu",
        "mask on the host": "tensors on cuda and on cpu",
        "item": "the host waits (item): tests/rehearsal/faults.py:",
        "waiting copy": "the host waits (copy from cpu to cuda): tests/rehearsal/faults.py:",
        "no autocast": "convolution in float32",
        "TF32": "convolution in TF32",
    }
    precision = {"no autocast": "bf16"}
    jobs = [job(f"digits {SMALL} precision={precision.get(fault, 'fp32')}", fault=fault) for fault in messages]
    for record, message in zip(rehearse(library, tmp_path, jobs), messages.values(), strict=True):
        expected = in_autocast("bfloat16") if record["job"]["fault"] in precision else FLOAT32
        assert [each for each in problems(record, products=expected) if message in each], record["job"]


@pytest.mark.long
def test_compiled_networks_are_single_graphs(library: Path, tmp_path: Path) -> None:
    recipe = f"digits {SMALL} compile=true"
    whole, broken = rehearse(library, tmp_path, [job(recipe, "cpu"), job(recipe, "cpu", "graph break")])
    assert problems(whole, products=set()) + whole["graph_breaks"] == []
    assert "graph_break()" in broken["graph_breaks"][0]


@pytest.mark.slow
def test_two_ranks_over_nccl_equal_one_process(library: Path, tmp_path: Path) -> None:
    """Losses, weights, statistics and queue; an exchange with sizes that do not fit, in which NCCL hangs, is found."""
    recipe = f"digits {SMALL} precision=fp32"
    jobs = [job(recipe), job(recipe, fault="unequal exchange"), job(recipe), job(f"{recipe} cuda_graph=true")]
    first, unequal, second, graph = rehearse(library, tmp_path / "two", jobs, processes=2)
    (one,) = rehearse(library, tmp_path / "one", [job(recipe, "cpu")])
    assert problems(first, one) + problems(second, one) + problems(graph, one) == []
    assert "NCCL Error 4" in unequal["error"]

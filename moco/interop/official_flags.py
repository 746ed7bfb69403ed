"""The flags of the official main_moco.py and main_lincls.py, and the equivalent commands of moco.

Flags and defaults are those of facebookresearch/moco at commit 7397dfe, except that by default --seed is 0, --dist-url
is empty and -a of main_lincls.py is the architecture that the checkpoint names, and that --print-command and
FIELD=VALUE are added. docs/howto/from_official.md explains them.
"""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moco.config.quoting import override
from moco.runtime.console import log, log_next


def _parser(script: str, lr: float, epochs: int, schedule: list[int], weight_decay: float) -> argparse.ArgumentParser:
    """Return a parser of the flags that both official scripts have, with the name and the defaults of one script."""
    description = f"Takes the flags of the official {script}, prints the equivalent command of moco, and runs it."
    flags = argparse.ArgumentParser(script, None, description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.set_defaults(script=script)
    flags.add_argument("data", metavar="DIR", help="the data set: DIR/train and DIR/val, one folder per class")
    flags.add_argument(
        "overrides", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of moco; they override the flags"
    )
    flags.add_argument("-j", "--workers", type=int, default=32, help="loader processes of a node")
    flags.add_argument("--epochs", type=int, default=epochs)
    flags.add_argument("--start-epoch", type=int, default=0, help="must be 0")
    flags.add_argument("-b", "--batch-size", type=int, default=256, help="images per step over all GPUs of a node")
    flags.add_argument("--lr", "--learning-rate", dest="lr", type=float, default=lr)
    flags.add_argument("--schedule", nargs="*", type=int, default=schedule, help="epochs at which lr is divided by 10")
    flags.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    flags.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, default=weight_decay)
    flags.add_argument("-p", "--print-freq", type=int, default=10, help="steps between two lines of the log")
    flags.add_argument("--resume", default="", help="not supported")
    flags.add_argument("--world-size", type=int, default=-1, help="nodes")
    flags.add_argument("--rank", type=int, default=-1, help="number of this node")
    flags.add_argument("--dist-url", default="", help="tcp://HOST:PORT of node 0")
    flags.add_argument("--dist-backend", default="nccl", help="ignored: nccl on GPUs, gloo on CPUs")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--gpu", type=int, default=None, help="use this GPU only")
    flags.add_argument("--multiprocessing-distributed", action="store_true", help="use all GPUs of the node")
    flags.add_argument("--print-command", action="store_true", help="print the command and end")
    return flags


_RESUME = {
    "main_moco.py": "moco resumes a run by itself: run the same command again. To start from weights: init_from=FILE",
    "main_lincls.py": "moco.linear does not resume: without this flag, it trains the classifier from the start",
}


@dataclass(frozen=True)
class Launch:
    """The processes of a run: `per_node` on each of `nodes` nodes."""

    nodes: int
    per_node: int
    words: list[str]  # the words of the command before `-m`


def _launch(flags: argparse.Namespace) -> Launch:
    """Return how the official flags start the processes.

    Raises:
        ValueError: for a flag without a counterpart, or nodes without an address; the message names the flag.
    """
    if flags.resume or flags.start_epoch:
        flag = f"--resume {flags.resume}" if flags.resume else f"--start-epoch {flags.start_epoch}"
        raise ValueError(f"{flag}: {_RESUME[flags.script]}")
    distributed = flags.multiprocessing_distributed and flags.gpu is None
    per_node = max(1, torch.cuda.device_count()) if distributed else 1
    if distributed and not torch.cuda.device_count():
        log("this machine has no GPU: one process on the CPU. With GPUs, torchrun starts one process for each")
    nodes = max(1, flags.world_size)
    if nodes == 1:
        words = ["torchrun", "--standalone", "--nproc-per-node", str(per_node)] if per_node > 1 else ["python"]
        return Launch(1, per_node, words)
    host, _, port = flags.dist_url.removeprefix("tcp://").rpartition(":")
    if not (flags.dist_url.startswith("tcp://") and host and port.isdigit()):
        raise ValueError(f"--world-size {nodes} needs --dist-url tcp://HOST:PORT, not {flags.dist_url!r}")
    if not 0 <= flags.rank < nodes:
        raise ValueError(f"--rank {flags.rank} must be from 0 to {nodes - 1}, for --world-size {nodes}")
    words = ["torchrun", "--nnodes", str(nodes), "--node-rank", str(flags.rank), "--master-addr", host]
    return Launch(nodes, per_node, [*words, "--master-port", port, "--nproc-per-node", str(per_node)])


def _data(flags: argparse.Namespace) -> list[str]:
    """Return the overrides of the data set and its loaders."""
    root = Path(flags.data)
    if (root / "train").is_dir() and not (root / "val").is_dir():
        return ["data=folder", override("data.root", root / "train")]  # enough for pretraining
    return ["data=imagenet", override("data.root", root)]  # the error of data=imagenet names a missing folder


def _run(launched: Launch, module: str, overrides: list[str], flags: argparse.Namespace) -> int:
    """Print the equivalent command, and replace this process by it; with --print-command, return 0 instead."""
    words = [*launched.words, "-m", module, *overrides, *flags.overrides]
    gpu = {} if flags.gpu is None else {"CUDA_VISIBLE_DEVICES": str(flags.gpu)}
    log_next(" ".join([*(f"{name}={value}" for name, value in gpu.items()), shlex.join(words)]))
    if flags.print_command:
        return 0
    start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    sys.stdout.flush()
    # A child process would not receive the signals sent to this process, and would still train after this one ended.
    os.execve(sys.executable, [*start, *words[1:]], os.environ | gpu)


def main_moco_parser() -> argparse.ArgumentParser:
    """Return the parser of the official flags."""
    flags = _parser("main_moco.py", 0.03, 200, [120, 160], 1e-4)
    flags.add_argument("-a", "--arch", default="resnet50", help="the backbone")
    flags.add_argument("--moco-dim", type=int, default=128, help="dimension of the embedding")
    flags.add_argument("--moco-k", type=int, default=65536, help="length of the queue")
    flags.add_argument("--moco-m", type=float, default=0.999, help="momentum of the key encoder")
    flags.add_argument("--moco-t", type=float, default=0.07, help="temperature")
    flags.add_argument("--mlp", action="store_true", help="MLP head")
    flags.add_argument("--aug-plus", action="store_true", help="augmentation of MoCo v2")
    flags.add_argument("--cos", action="store_true", help="cosine schedule")
    return flags


def main_moco_overrides(flags: argparse.Namespace, launched: Launch) -> list[str]:
    """Return the overrides of moco.train that train as the official code does with these flags.

    Raises:
        ValueError: if the batch cannot be divided by the GPUs.
    """
    per_gpu, rest = divmod(flags.batch_size, launched.per_node)
    if rest:
        raise ValueError(f"--batch-size {flags.batch_size} must be a multiple of the node's GPUs, {launched.per_node}")
    # A BN group has the images of one GPU. A single process uses groups of 32 instead, because the official recipe has
    # 8 GPUs with 32 images each. A command that is printed on a machine without a GPU has groups of 32, too: it is for
    # another machine, whose number of GPUs is unknown.
    alone = launched.per_node * launched.nodes == 1 or not torch.cuda.device_count()
    schedule = (
        ["optim=sgd_cosine"] if flags.cos else ["optim=sgd_step", f"optim.milestones={flags.schedule}".replace(" ", "")]
    )
    version = "v2" if flags.aug_plus else "v1"
    return [
        "experiment=moco_v1_imagenet",
        *_data(flags),
        f"augment=moco_{version}",
        *schedule,
        f"model.backbone={flags.arch}",
        f"model.head_layers={2 if flags.mlp else 1}",
        f"model.dim={flags.moco_dim}",
        f"model.bn_group_size={min(32, per_gpu) if alone else per_gpu}",
        f"method.queue_size={flags.moco_k}",
        f"method.momentum={flags.moco_m}",
        f"method.temperature={flags.moco_t}",
        f"optim.lr={flags.lr}",
        "optim.base_batch=null",
        "optim.per_epoch=true",
        f"optim.momentum={flags.momentum}",
        f"optim.weight_decay={flags.weight_decay}",
        f"epochs={flags.epochs}",
        f"batch_size={flags.batch_size * launched.nodes}",
        f"data.workers={-(-flags.workers // launched.per_node)}",
        f"log_every={flags.print_freq}",
        f"seed={flags.seed}",
        "precision=fp32",
        f"run=runs/main_moco_{flags.arch}_{flags.epochs}ep",
    ]


def main_lincls_parser() -> argparse.ArgumentParser:
    """Return the parser of the official flags."""
    flags = _parser("main_lincls.py", 30.0, 100, [60, 80], 0.0)
    arch = "the backbone (default: the one that the checkpoint names)"
    flags.add_argument("-a", "--arch", default=argparse.SUPPRESS, help=arch)
    flags.add_argument("--pretrained", default="", help="the checkpoint, official or of moco, or the folder of a run")
    flags.add_argument("-e", "--evaluate", action="store_true", help="not supported: results.json holds the accuracy")
    return flags


def main_lincls_overrides(flags: argparse.Namespace, launched: Launch) -> list[str]:
    """Return the overrides of moco.linear that train as the official code does with these flags.

    Raises:
        ValueError: without a checkpoint, or for --evaluate.
    """
    if flags.evaluate:
        raise ValueError(
            "--evaluate: every run of moco.linear ends with the accuracy on the validation images, in results.json"
        )
    if not flags.pretrained:
        raise ValueError("--pretrained FILE is missing: the checkpoint to evaluate")
    arch = [f"backbone={flags.arch}"] if "arch" in flags else []
    return [
        override("run" if Path(flags.pretrained).is_dir() else "checkpoint", flags.pretrained),
        *arch,
        "protocol=moco_v2",
        *_data(flags),
        f"epochs={flags.epochs}",
        f"batch_size={flags.batch_size * launched.nodes}",
        f"momentum={flags.momentum}",
        f"official.lr={flags.lr}",
        f"official.milestones={flags.schedule}".replace(" ", ""),
        f"official.weight_decay={flags.weight_decay}",
        f"data.workers={-(-flags.workers // launched.per_node)}",
        f"seed={flags.seed}",
    ]


def main(script: str, arguments: list[str]) -> int:
    """Replace this process by the command of moco that is equivalent to the script with these arguments.

    `script` is "main_moco" or "main_lincls".
    """
    parser, overrides, module = {
        "main_moco": (main_moco_parser(), main_moco_overrides, "moco.train"),
        "main_lincls": (main_lincls_parser(), main_lincls_overrides, "moco.linear"),
    }[script]
    flags = parser.parse_intermixed_args(arguments)
    try:
        launched = _launch(flags)
        return _run(launched, module, overrides(flags, launched), flags)
    except ValueError as error:
        parser.error(str(error))

"""`python -m moco.transfer`: several encoders on many labeled data sets, all by one protocol."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.config import ConfigError, require
from moco.config.subject import SubjectConfig
from moco.config.transfer import TransferConfig
from moco.data.transfer_sets import SETS
from moco.digest import digest
from moco.distributed import on_rank_zero
from moco.evaluation.encoders import fields_of_encoder
from moco.evaluation.seen import count_seen, held_out_seen, log_labels, paths_of, refuse_or_warn
from moco.evaluation.subject import Subject, data_config, data_with_absolute_paths, open_subject, weights_digest
from moco.evaluation.task import changed_images, changed_settings, describe_encoder, describe_start
from moco.evaluation.transfer_data import MEASURES, OF_FIELDS, Splits, check_names, open_set
from moco.evaluation.transfer_measures import MODES, Candidate, EvaluatedEncoder
from moco.evaluation.transfer_results import (
    FOLDER,
    SetResults,
    read_results,
    result_file,
    short_name,
    show,
    write_results,
)
from moco.interop.encoder_file import EncoderFile
from moco.runs.results import prepare, record
from moco.runtime.console import log, log_next, percent
from moco.runtime.device import compute_context
from moco.runtime.next_command import command
from moco.runtime.output_directory import lock_directory
from moco.runtime.preemption import keeping

# The fields on which the results of a mode depend, besides the encoders and the data.
SETTINGS = {
    "linear": ("validation", "precision", "seed"),
    "few_shot": ("ways", "shots", "queries", "episodes", "precision", "seed"),
    "finetune": ("finetune", "precision", "seed"),
}
NOTES = {
    "linear": "logistic regression on frozen features, its L2 penalty chosen on validation images; mAP: a linear SVM "
    "per class; in parentheses or after ±: the 95 % interval due to the number of test images",
    "few_shot": "nearest mean of {shots} labeled images per class, {queries} queries per class; mean of {episodes} "
    "episodes ± half of its 95 % interval",
    "finetune": "encoder and classifier trained end to end on all labeled images; in parentheses or after ±: the 95 % "
    "interval due to the number of test images or, with several seeds, of the mean over the seeds",
}
DEFAULTS = TransferConfig(sets=["data"], encoders=["pretrained", "untrained"])  # those of configs/transfer.yaml


def evaluate_transfer(config: TransferConfig) -> list[SetResults]:
    """Evaluate each encoder on each data set, record the results, and print them in one table.

    Results that an earlier call recorded with the same settings, images and weights are not computed again.

    Returns:
        The results of each data set, the same on every rank.

    Raises:
        ConfigError, FileNotFoundError, ValueError: for an unknown data set, or if data or an encoder cannot be used.
    """
    check_names(config.sets)
    with compute_context(config) as device, ExitStack() as locks:
        own = open_subject(config)
        candidates, output = open_candidates(config, own), own.output
        prepare(output)
        on_rank_zero(lambda: bool(locks.enter_context(lock_directory(output / FOLDER, "output"))))
        # The name of a data set of the literature determines its images. The other data sets are opened now, because
        # their digests are needed, and because a data set that cannot be evaluated must end the command before anything
        # is computed.
        opened = {name: None if name in SETS else open_set(name, config, own) for name in config.sets}
        for name, splits in opened.items():
            if splits is not None:
                _check_seen_images(name, splits, config, own, candidates)
        with keeping("finished results", lambda: any((output / FOLDER).glob(f"{config.mode}_*.json"))):
            found = [_evaluate_set(name, splits, config, own, candidates, device) for name, splits in opened.items()]
        _report(config, found, output)
    return found


def open_candidates(config: TransferConfig, own: Subject) -> list[Candidate]:
    """Read the entries of `encoders`, in this order. `own` is the encoder that the fields run or checkpoint name.

    Raises:
        ConfigError: for an encoder that cannot be read, or whose images have another number of channels than those of
            `own`.
    """
    found = []
    for name in config.encoders:
        subject, seed = own, None
        if name == "untrained":
            seed = own.file.seed
        elif name != "pretrained":
            subject = _open_other(name, config)
        # If `sets` has the entry "data", `open_set` calls `log_labels` for `own`.
        if seed is None and (subject is not own or OF_FIELDS not in config.sets):
            log_labels(subject.file)
        about: dict[str, Any] = {"weights": weights_digest(subject.file, "backbone"), "look": asdict(subject.transform)}
        if seed is not None:
            about["weights"] = [subject.file.backbone, subject.file.options, subject.file.channels, seed]
        found.append(Candidate(name, subject, seed, digest(about)))
        same = subject.file.channels == own.file.channels
        takes = f"takes images of {subject.file.channels} channels, not {own.file.channels}"
        require(same, f"encoders={name} {takes} as {own.file.source} does: remove it")
    return found


def _open_other(name: str, config: TransferConfig) -> Subject:
    other = SubjectConfig(**fields_of_encoder(name), images=config.images)
    try:
        return open_subject(other)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"encoders={name}: {error}") from error


def _check_seen_images(
    name: str, splits: Splits, config: TransferConfig, own: Subject, candidates: Sequence[Candidate]
) -> None:
    """Refuse test images if an encoder was trained with their labels; warn if one saw them without labels."""
    paths = paths_of(splits.test.source)
    for file in _files_that_saw(name, splits, config, own, candidates):
        if name == OF_FIELDS and file is own.file:
            continue  # `open_set` checked it
        count = count_seen(paths, file)
        found = f"{count:,} of the {len(paths):,} test images are" if count else "test images can be"
        problem = f"sets={name}: {found} among the images that {file.source} was trained on"
        refuse_or_warn(problem, file, "name a folder of other images in sets")


def _evaluate_set(
    name: str,
    splits: Splits | None,
    config: TransferConfig,
    own: Subject,
    candidates: Sequence[Candidate],
    device: torch.device,
) -> SetResults:
    """Evaluate on one data set the encoders that lack a valid recorded result; write the file after each encoder.

    `splits` is None for a data set that is opened only if a result is missing.
    """
    file = result_file(own.output, name, config.mode)
    settings = {each: getattr(config, each) for each in SETTINGS[config.mode]}
    wanted = SetResults(name, config.mode, settings | {"images": splits.digest() if splits else name})
    found, problem = on_rank_zero(lambda: read_results(file, wanted))
    digests = {each.name: each.digest for each in candidates}
    missing = found.lacking(digests)
    for each in missing:
        if each in found.encoders:
            log(f"{name}: {each} has other weights, or another preparation of images, than in {file}: evaluated again")
    if problem:
        log(problem)
    if len(missing) < len(candidates):
        log(f"{name}: {len(candidates) - len(missing)} of {len(candidates)} encoders are already in {file}")
    if not missing:
        return found
    splits = splits or open_set(name, config, own)
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    sizes = {part: len(images.source) if images else 0 for part, images in parts.items()}
    found.about = {"measure": splits.measure, "classes": splits.classes} | sizes
    seen = bool(_files_that_saw(name, splits, config, own, candidates))
    found.about["data"] = _data_of(name, config, own) | {"held_out_seen": seen}
    found.about["changed"] = changed_settings(config, "transfer", SETTINGS[config.mode]) | changed_images(config)
    if splits.test.labels.ndim == 1:
        found.about["test_per_class"] = sorted(np.bincount(splits.test.labels).tolist(), reverse=True)
    counted = ", ".join(f"{count:,} {part}" for part, count in sizes.items() if count)
    log(f"{name}: {splits.classes} classes; images: {counted}")
    measure = MODES[config.mode](name, splits, config)
    for candidate in candidates:
        if candidate.name in missing:
            result = measure(EvaluatedEncoder(candidate, config, device, f"{name}, {candidate.name}"))
            found.encoders[candidate.name] = {"digest": candidate.digest} | result
            shown = percent(result["value"], result.get("half_width95"), result.get("interval95"))
            log(f"{name}, {candidate.name}: {shown} %")  # before writing: the result stays visible if writing fails
            on_rank_zero(lambda: _write(file, found, candidate, config, own.output))  # noqa: B023 # called at once
    return found


def _files_that_saw(
    name: str, splits: Splits, config: TransferConfig, own: Subject, candidates: Sequence[Candidate]
) -> list[EncoderFile]:
    """Return the files of the trained encoders that can have seen test images in their training."""
    files, test = [each.subject.file for each in candidates if each.seed is None], splits.test.source
    if name != OF_FIELDS:
        return [file for file in files if count_seen(paths_of(test), file)]
    data = data_config(config, own)
    return [file for file in files if held_out_seen(data, config.data.hold_out, file, test)]


def _data_of(name: str, config: TransferConfig, own: Subject) -> dict[str, Any]:
    """Return the data set of an entry of `sets` for results.json, with absolute paths."""
    if name == OF_FIELDS:
        return data_with_absolute_paths(config, own) | {"hold_out": config.data.hold_out}
    return {"name": name} if name in SETS else {"name": "folder", "root": str(Path(name).absolute())}


def _write(file: Path, found: SetResults, candidate: Candidate, config: TransferConfig, output: Path) -> None:
    """Write the data set's results to `file`, and the candidate's result to results.json, which the report shows.

    For rank 0.
    """
    write_results(file, found)
    encoder = candidate.subject.file
    entry = {
        "command": "transfer",
        "protocol": f"{found.mode}, {short_name(found.name)}",
        **describe_start(config, candidate.name, config.seed if found.mode == "finetune" else encoder.seed),
        **describe_encoder(encoder),
        "look": asdict(candidate.subject.transform),
        "data": found.about["data"] | {"held_out": found.about["test"], "training": found.about["training"]},
        "settings": found.settings,
        "changed": found.about["changed"],
        "figures": found.encoders[candidate.name]["figures"],
    }
    record(output, [entry], encoder.step)


def _report(config: TransferConfig, found: Sequence[SetResults], output: Path) -> None:
    """Print the table, the written files and the next command."""
    title = {
        "linear": "transfer, logistic regression",
        "few_shot": f"transfer, {config.ways}-way {config.shots}-shot",
        "finetune": "transfer, fine-tuned",
    }[config.mode]
    note = NOTES[config.mode].format(**vars(config))
    show(title, found, config.encoders, MEASURES, note)
    log(f"written: {output / FOLDER}/{config.mode}_*.json and {output / 'results.json'}")
    fields = {"sets": config.sets, "encoders": config.encoders, "root": config.root}
    shown = {name: value for name, value in fields.items() if value != getattr(DEFAULTS, name)}
    if config.mode == "linear" and (episodes := _episode_fields(found)) is not None:
        few_shot = command("moco.transfer", config, mode="few_shot", **shown, **episodes)
        log_next(few_shot, "classify by a few labeled images per class")
    elif config.mode != "linear":
        log_next(command("moco.transfer", config, **shown), "logistic regression on the same data")


def _episode_fields(found: Sequence[SetResults]) -> dict[str, int] | None:
    """Return ways and queries for which every data set has enough test images; a value that is the default is left out.

    None if a data set has too few test images for a single query, or images with several labels.
    """
    counts = [each.about.get("test_per_class", []) for each in found]
    if not all(counts):
        return None
    ways = min(DEFAULTS.ways, *map(len, counts))
    queries = min(DEFAULTS.queries, *(each[ways - 1] - DEFAULTS.shots for each in counts))
    fields = {"ways": ways, "queries": queries}
    return {name: value for name, value in fields.items() if value != getattr(DEFAULTS, name)} if queries > 0 else None

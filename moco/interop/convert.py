"""The work of moco.convert: write an encoder in another format, read it again, compare, and then keep the file."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moco.config import ConfigError, DataConfig, require
from moco.config.convert import ConvertConfig
from moco.data.pixel_format import PixelFormat
from moco.data.sources import ArraySource, Source, load_source
from moco.evaluation.features import Inference, Network, stream
from moco.evaluation.subject import Subject, data_config, open_data, open_subject, weights_digest
from moco.files import WriteError, cause, flush, resolved, write_errors
from moco.interop.encoder_file import EncoderFile, build
from moco.interop.hub import CARD, WEIGHTS, upload
from moco.interop.model_card import model_card, shareable
from moco.interop.write import FORMATS, timm_name
from moco.runs.comparison import of_weights
from moco.runs.results import recorded
from moco.runtime.console import log, summary_panel
from moco.runtime.output_directory import prepare_output

_BATCH_SIZE = 16


class ConversionError(ValueError):
    """The written file differs from the source, or cannot be compared with the source. The message is one sentence."""


def convert_encoder(config: ConvertConfig) -> None:
    """Convert the configured encoder, and print where it is and how to load it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    _refuse_existing(config, output)
    subject = open_subject(config)
    file, transform = replace(subject.file, images=asdict(subject.transform)), subject.transform
    written = output / WEIGHTS if FORMATS[config.to].folder else output
    same = written.exists() and written.samefile(file.source)
    require(not same, f"output={output} is the source file: choose another")
    chosen, fitting = FORMATS[config.to], [name for name, each in FORMATS.items() if each.fits(file)]
    require(
        config.to in fitting,
        f"to={config.to} supports {chosen.holds}, but {file.source} has backbone={file.backbone} "
        f"options={file.options} for images of {file.channels} channels: set to=NAME, one of {', '.join(fitting)}",
    )
    backbone = build(file).get_submodule("backbone")
    source, data = _comparison_images(config, subject)
    rows = range(0, len(source), max(1, len(source) // config.pictures))[: config.pictures]

    def features(network: Network) -> Tensor:  # (M, D)
        return torch.cat(list(stream(network, source, rows, transform, Inference(torch.device("cpu"), _BATCH_SIZE))))

    log(f"{file.source} ({file.layout}: {file.backbone}{file.trained}) to {config.to}")
    if output.is_dir():
        prepare_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".convert-", dir=output.parent)  # same disk, for the rename
    except OSError as error:
        raise ConfigError(f"output={output} cannot be written: {error.strerror}") from error
    with folder:
        temporary = Path(folder.name) / output.name
        try:
            difference, largest = write_and_compare(config.to, temporary, file, backbone, features)
            if chosen.folder:
                (temporary / CARD).write_text(_card(config, file, backbone))
        except WriteError as error:
            raise WriteError(f"output={output} cannot be written ({cause(error)}): free some space") from error
        _move(temporary, output)
    mean, std = list(transform.mean), list(transform.std)
    resized = f", the shorter side to {transform.resize} first" if transform.resize else ""
    summary_panel(
        "converted",
        [
            ("encoder", f"{file.source} ({file.backbone}, {config.weights}{file.trained})"),
            ("file", f"{output} ({written.stat().st_size / 1e6:.1f} MB)"),
            ("checked", f"read again: features of {len(rows)} images ({data}) differ by {difference:.2g} at most,"),
            ("", f"the largest feature is {largest:.3g}"),
            ("images", f"{transform.size} px{resized}; minus mean {mean}, divided by std {std}"),
            *([("size", _only_this_size(transform.size))] * chosen.fixed_size),
        ],
    )
    log(f"to load it: {chosen.loading(file).replace('FILE', str(output))}")
    if config.upload:
        log(f"uploaded to {upload(output, config.upload, config.public)}")


def _refuse_existing(config: ConvertConfig, output: Path) -> None:
    """Refuse an output that exists, unless overwrite=true; an empty folder is accepted by formats that write a folder.

    A folder in the place of a file, or a file in the place of a folder, is always refused.
    """
    folder = FORMATS[config.to].folder
    require(folder or not output.is_dir(), f"output={output} is a directory: name a file in it")
    require(not folder or output.is_dir() or not output.exists(), f"output={output} is a file: name a folder")
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    require(config.overwrite or not taken, f"output={output} exists: choose another, or set overwrite=true")


def _move(temporary: Path, output: Path) -> None:
    """Move a file to `output`, or the files of a folder into the folder `output`, where other files stay."""
    if temporary.is_dir():
        output.mkdir(exist_ok=True)
        for each in sorted(temporary.iterdir()):
            each.replace(output / each.name)
    else:
        temporary.replace(output)


def _card(config: ConvertConfig, file: EncoderFile, backbone: nn.Module) -> str:
    """Return the model card, with the results of exactly these weights and the baselines."""
    title = config.upload.rpartition("/")[2] or resolved(config.output).name
    shared = replace(file, config=shareable(file.config))
    parameters = sum(each.numel() for each in backbone.parameters())
    digests = [weights_digest(file, features) for features in ("backbone", "projection")]
    source = Path(file.source)
    places = [Path(config.run)] if config.run else [source.parent, source.parent.parent, Path("runs") / source.stem]
    entries = of_weights([each for place in places for each in recorded(place)], digests)
    return model_card(shared, title, timm_name(file) is not None, parameters, entries, config.upload)


def _only_this_size(size: int) -> str:
    """Describe which images an exported graph accepts, and how to convert the encoder for another size."""
    other = f"images.size={2 * size} images.resize={2 * size}"
    return f"any number of images at once, but only of {size} x {size} px; for another size convert again, e.g. {other}"


def write_and_compare(
    to: str, path: Path, file: EncoderFile, backbone: nn.Module, features: Callable[[Network], Tensor]
) -> tuple[float, float]:
    """Write a file, read it again, and compare it with the source.

    Args:
        to: the format, a key of `FORMATS`.
        path: the file or folder to write.
        file: the source, with `images`.
        backbone: the network of the source, in eval mode on the CPU.
        features: computes a network's features (M, D) of fixed images.

    Returns:
        The largest difference between features of the source and of the file, and the largest feature.

    Raises:
        ConversionError: if weights are not equal bit for bit, if the difference exceeds the format's tolerance, or if
            all features are 0, because their comparison would prove nothing.
        WriteError: if the system does not let the file be written.
    """
    chosen = FORMATS[to]
    with write_errors(path):
        chosen.write(path, file, backbone)
        flush(path)  # some file systems report a full disk only now
    again = chosen.read(path, file)
    weights = {name: each for name, each in backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    changed = [name for name, each in weights.items() if again.weights and not torch.equal(each, again.weights[name])]
    if changed:
        names = ", ".join(changed[:3])
        raise ConversionError(
            f"to={to}: {len(changed)} weights differ from the source after conversion ({names}), so {path.name} was "
            "not kept: set to=NAME, another format"
        )
    wanted = features(backbone)
    if not wanted.any():
        raise ConversionError(
            f"{file.source} has features 0 for every image, so a comparison would prove nothing: name other images "
            "with data.root=FOLDER, or another checkpoint"
        )
    difference, largest = (features(again.network) - wanted).abs().max().item(), wanted.abs().max().item()
    if not difference <= chosen.tolerance * largest:  # also true for NaN
        raise ConversionError(
            f"to={to}: features differ by {difference:.2g} after conversion, more than {chosen.tolerance:g} of the "
            f"largest feature ({largest:.2g}), so {path.name} was not kept: set to=NAME, another format"
        )
    return difference, largest


def _comparison_images(config: ConvertConfig, subject: Subject) -> tuple[Source, str]:
    """Return images for the comparison, and a name for them: the configured images, the run's, or built-in images.

    The built-in images are scikit-learn's digits or, for an encoder of images that are not RGB, random numbers.
    """
    configured = config.data.name is not None or config.data.root is not None  # by the user
    if configured or subject.file.config.get("data"):
        lazily = replace(config, data=replace(config.data, resident=False))  # only a few images are read
        try:
            return open_data(lazily, subject).train, data_config(lazily, subject).name
        except (FileNotFoundError, ValueError):
            if configured:
                raise
    if subject.file.channels == 3:
        return load_source(DataConfig("digits")).train, "digits"
    shape = config.pictures, subject.file.channels, subject.transform.size, subject.transform.size
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [f"noise {i}" for i in range(config.pictures)]
    return ArraySource(noise, names, pixel_format=PixelFormat(subject.file.channels)), "random numbers"

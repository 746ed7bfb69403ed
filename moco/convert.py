"""Convert an encoder to another project's format: `python -m moco.convert run=DIR to=FORMAT output=FILE`."""

from moco.cli import run_command
from moco.config.convert import ConvertConfig, check_convert


def convert(config: ConvertConfig) -> None:
    """Writes an encoder's backbone in another format, once what was written has been read again and compared.

    Raises:
        ConfigError: for a configuration that cannot run.
        ValueError: for a network that the format does not hold, or if what was written is not the same encoder.
        FileNotFoundError: for an encoder that is not there.
    """
    check_convert(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.interop.convert import convert_encoder

    convert_encoder(config)


if __name__ == "__main__":
    run_command("convert", ConvertConfig, convert)

"""Convert an encoder to another project's format: `python -m moco.convert run=DIR to=FORMAT output=FILE`."""

from moco.cli import Command
from moco.config.convert import ConvertConfig, check_convert

convert = Command("convert", ConvertConfig, check_convert, "moco.interop.convert:convert_encoder")

if __name__ == "__main__":
    convert.main()

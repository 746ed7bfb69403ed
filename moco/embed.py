"""Features of any pictures, in files: `python -m moco.embed run=DIR data=folder data.root=IMAGES output=OUT`."""

from moco.cli import run_command
from moco.config.embed import EmbedConfig, check_embed


def embed(config: EmbedConfig) -> None:
    """Writes features.npy, the table of its rows and features.json, or goes on with what is there.

    Raises:
        ConfigError: for a configuration that cannot run, or an output that holds something else.
        FileNotFoundError: for data or an encoder that is not there.
        ImageError: for a picture that cannot be read, with on_bad_image=stop.
    """
    check_embed(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.retrieval.embed import embed as run

    run(config)


if __name__ == "__main__":
    run_command("embed", EmbedConfig, embed)

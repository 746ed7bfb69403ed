"""Write the features of images to files: `python -m moco.embed run=DIR data=folder data.root=IMAGES output=OUT`."""

from moco.cli import Command
from moco.config.embed import EmbedConfig, check_embed

embed = Command("embed", EmbedConfig, check_embed, "moco.retrieval.embed:embed")

if __name__ == "__main__":
    embed.main()

"""Studies over several runs: the effect of the temperature, and choosing a checkpoint without labels."""

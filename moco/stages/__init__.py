"""From a configuration to a summary: the work behind each command."""

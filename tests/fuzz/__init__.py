"""A fuzzer of the commands, `python -m tests.fuzz --help`: all that a person types ends well or in one sentence."""

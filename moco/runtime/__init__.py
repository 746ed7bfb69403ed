"""The process: console, standard streams, signals, watchdog, device, memory and precision."""

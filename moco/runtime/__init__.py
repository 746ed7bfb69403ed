"""The process: console, standard streams, preemption, watchdog, memory and precision."""

"""The process, not the work: device, seed, interruption, files, metrics, progress, errors."""

"""Settings of published runs, one file each: `config()` returns the TrainConfig."""

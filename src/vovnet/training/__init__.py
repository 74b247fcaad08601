"""Training on one machine: settings, one plain loop, checkpoints that resume exactly, the run."""

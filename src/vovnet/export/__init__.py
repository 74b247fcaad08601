"""From a trained network to a file for other engines."""

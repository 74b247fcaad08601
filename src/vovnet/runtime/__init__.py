"""Engines that run a trained network."""

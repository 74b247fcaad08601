"""What an image costs: operations, parameters, time and energy."""

"""Ways to run a step: as it is, compiled, captured, or through exported graphs."""

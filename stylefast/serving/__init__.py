"""The HTTP service: `stylefast serve`, OpenAI's and A1111's image APIs in front of an engine in its own process."""

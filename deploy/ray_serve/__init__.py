"""Vitrine on Ray Serve, which decides how many encoders and LLM workers run and where. Rows do not pass through it."""

"""Vitrine on Ray Serve, which decides how many encoders and LLM workers run and where. Data go past it."""

"""The live page of a worker and its encoders."""

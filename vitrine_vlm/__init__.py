"""Vitrine: vision encoders and LLM workers for vision-language models.

The parts below this package are links to the folders at the top of the repository; wheels have the files themselves.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vitrine-vlm")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

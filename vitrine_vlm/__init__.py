"""Vitrine: vision encoders and LLM workers for vision-language models.

In a checkout the subpackages are links to the folders at the top of the repository; a wheel contains the files.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vitrine-vlm")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

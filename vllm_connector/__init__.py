"""Vitrine's connector for vLLM: an encoder-cache connector that lands embeddings of Vitrine's encoders in its workers.

A contract in pyproject.toml names the modules that may import vllm.
"""

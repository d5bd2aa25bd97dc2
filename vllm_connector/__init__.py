"""Vitrine's connector for vLLM: an encoder-cache connector that lands embeddings of Vitrine's encoders in its workers.

Only `connector`, `metrics`, `plugin` and `qwen3_vl` may import vllm.
"""

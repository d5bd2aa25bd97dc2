"""Flags of vLLM and SGLang that the chart sets, with underscores, as both take them in a file.

Source: `vllm serve --help` of vLLM 0.32; SGLang 0.5.17 to 0.5.23, srt/server_args.py and srt/arg_groups/fields.
"""

from __future__ import annotations

VLLM_FLAGS = {
    *("model", "revision", "served_model_name", "host", "port", "shutdown_timeout", "otlp_traces_endpoint"),
    *("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ec_transfer_config", "limit_mm_per_prompt"),
}
SGLANG_FLAGS = {
    *("model_path", "revision", "served_model_name", "host", "port", "log_level", "ssl_certfile", "ssl_keyfile"),
    *("language_only", "encoder_bootstrap_port", "encoder_transfer_backend", "enable_metrics"),
}

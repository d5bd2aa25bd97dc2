"""Settings of an LLM worker: flags win over the environment (VITRINE_LLM_*), which wins over defaults."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from vitrine_vlm.embedding_transport.clients.settings import EncoderSettings
from vitrine_vlm.embedding_transport.fleet.discovery import Source, parse_sources
from vitrine_vlm.embedding_transport.shipping.settings import PeerSettings
from vitrine_vlm.llm_worker.engine.config import EngineConfig, KvCacheDtype
from vitrine_vlm.service_runtime.access_settings import AccessSettings
from vitrine_vlm.service_runtime.settings import ServiceSettings

MIB = 1024 * 1024
_BLOCK_SIZE = 16


class LlmConfig(ServiceSettings, AccessSettings, EncoderSettings, PeerSettings):
    """Vitrine's LLM worker: generates tokens from prompts and media embeddings, over OpenAI HTTP and gRPC."""

    service_name = "vitrine-llm"
    model_config = SettingsConfigDict(env_prefix="VITRINE_LLM_", cli_prog_name="vitrine-llm")

    model: str = Field(description="checkpoint folder or hub id, the same as the encoders'")
    revision: str | None = Field(None, description="hub branch, tag or commit; not used for folders")
    served_model_name: str | None = Field(None, description="name to serve under instead of hub id or folder name")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights, for measuring without their files; answers are meaningless"
    )

    role: Literal["both", "prefill", "decode"] = Field(
        "both",
        description="prefill: also sends prompts' keys and values to decode workers; decode: receives them from "
        "--prefill-workers and needs no encoders",
    )
    prefill_workers: str = Field(
        "",
        description="gRPC addresses of a decode worker's prefill workers, in the forms of --encoders; "
        "--encode-timeout-s and --encoder-* apply to them, too",
    )

    pool_bytes: int = Field(1024 * MIB, ge=MIB, description="a prefill worker's pool in shared memory, bytes")
    cuda_ipc_pool_bytes: int = Field(
        4096 * MIB, ge=0, description="a prefill worker's GPU memory that decode workers map, bytes; 0 is off"
    )
    lease_ttl_s: float = Field(60.0, gt=0, description="how long a decode worker may hold KV in these pools, s")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one, see the LISTENING line")
    grpc_port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    drain_timeout_s: float = Field(30.0, ge=0, description="longest wait for running requests at shutdown, s")

    allowed_origins: str = Field(
        "", description="origins whose pages may call the HTTP port from a browser, separated by commas; * for any"
    )
    allow_cache_reset: bool = Field(
        False, description="serve /reset_prefix_cache and /flush_cache, which empty the prefix cache"
    )
    allow_special_tokens_in_text: bool = Field(
        False,
        description="let control tokens in the text of chats be control tokens, so that users can forge turns and "
        "placeholders; else they are text",
    )
    trust_request_chat_template: bool = Field(
        False, description="render the chat templates that requests bring, in Jinja's sandbox; else they are refused"
    )

    dashboard: bool = Field(True, description="serve the live page at /dashboard; see --metrics-port")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the decoder runs; auto: a GPU if any")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights, KV cache and embeddings; auto: the checkpoint's on a GPU, float32 on the CPU"
    )
    kv_cache_dtype: KvCacheDtype = Field(
        "auto",
        description="of the KV cache; auto: that of --dtype; fp8: e4m3, for twice the tokens of bfloat16 in the same "
        "memory, with the checkpoint's scales or 1",
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8: the layers' weights in e4m3, one scale a channel; experts and lm_head stay as they are. "
        "Checkpoints in FP8 need no flag",
    )
    tp: int = Field(1, ge=1, description="tensor parallel: GPUs that share the decoder, one process each")

    max_model_len: int | None = Field(None, ge=1, description="longest prompt plus answer, tokens; default the model's")
    max_num_batched_tokens: int = Field(8192, ge=1, description="tokens in one step: the longest prefill chunk")
    target_itl_ms: float = Field(
        30.0, gt=0, description="goal for the time between tokens, which bounds steps that decode beside prompts, ms"
    )
    target_ttft_ms: float = Field(
        500.0, gt=0, description="goal for a first token, from when its prompt and media are here, ms"
    )
    mixed_step_tokens: int | None = Field(
        None, ge=1, description="most tokens in a step that also decodes, whatever the goals allow; default no limit"
    )
    max_num_seqs: int = Field(64, ge=1, description="requests in one step")
    kv_cache_tokens: int | None = Field(
        None, ge=_BLOCK_SIZE, description="tokens that the KV cache holds; default: what fits, 32768 on the CPU"
    )
    gpu_memory_utilization: float = Field(
        0.85, gt=0, le=1, description="part of the GPU's memory to use, where kv_cache_tokens is not given"
    )
    prefix_cache: bool = Field(True, description="use keys and values again for prompts with the same beginning")
    max_waiting: int = Field(512, ge=0, description="requests that may wait before more are refused with 429")
    max_items: int = Field(64, ge=0, description="images and videos accepted in one request")
    skip_tokenizer_init: bool = Field(False, description="load no tokenizer: token ids in, token ids out")

    @field_validator("prefill_workers")
    @classmethod
    def _check_prefill_workers(cls, specs: str) -> str:
        if specs:
            parse_sources(specs)
        return specs

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        needed, other = ("prefill_workers", "encoders") if self.role == "decode" else ("encoders", "prefill_workers")
        if not getattr(self, needed) or getattr(self, other):
            raise ValueError(f"--role {self.role} needs {_flag(needed)}, and takes no {_flag(other)}")
        if self.role == "prefill" and (self.api_key.get_secret_value() or self.api_keys_file):
            raise ValueError(
                "--role prefill takes no API keys: its callers are decode workers, which show certificates: set "
                "--tls-client-ca-file here, and keys at the decode workers"
            )
        if self.role != "both" and self.tp > 1:
            raise ValueError(
                f"--role {self.role} needs --tp 1, not {self.tp}: a rank has the keys and values of its own heads only"
            )
        return self

    def sources(self) -> list[Source]:
        """Sources of the encoders' addresses, or of a decode worker's prefill workers."""
        return parse_sources(self.prefill_workers if self.role == "decode" else self.encoders)

    def origins(self) -> frozenset[str]:
        return frozenset(origin.strip().rstrip("/") for origin in self.allowed_origins.split(",") if origin.strip())

    @property
    def pool_gpu_nbytes(self) -> int:
        """GPU memory of a prefill worker's pool, which the engine must not use, bytes."""
        return self.cuda_ipc_pool_bytes if self.role == "prefill" else 0

    def engine_config(self, max_position_embeddings: int, kv_tokens_that_fit: int) -> EngineConfig:
        max_model_len = min(self.max_model_len or max_position_embeddings, max_position_embeddings)
        # All requests together need no more than this, in whole blocks; more would only serve the prefix cache.
        longest = -(-max_model_len // _BLOCK_SIZE) * _BLOCK_SIZE
        kv_cache_tokens = self.kv_cache_tokens or min(kv_tokens_that_fit, self.max_num_seqs * longest)
        return EngineConfig(
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            block_size=_BLOCK_SIZE,
            num_blocks=max(1, kv_cache_tokens // _BLOCK_SIZE),
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=max_model_len,
            max_waiting=self.max_waiting,
            prefix_cache=self.prefix_cache,
            mixed_step_tokens=self.mixed_step_tokens,
            target_itl_s=self.target_itl_ms / 1000,
            target_ttft_s=self.target_ttft_ms / 1000,
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

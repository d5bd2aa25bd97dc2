"""Settings of an encoder process: flags win over the environment (VITRINE_ENCODER_*), which wins over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from vitrine_vlm.embedding_transport.shipping.settings import PeerSettings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.service_runtime.settings import ServiceSettings

MIB = 1024 * 1024


class EncoderConfig(ServiceSettings, PeerSettings):
    """Vitrine's encoder: images and videos in, embedding rows out, over gRPC."""

    service_name = "vitrine-encoder"
    model_config = SettingsConfigDict(env_prefix="VITRINE_ENCODER_", cli_prog_name="vitrine-encoder")

    model: str = Field(description="checkpoint folder or hub id")
    revision: str | None = Field(None, description="hub branch, tag or commit; not used for folders")
    served_model_name: str | None = Field(None, description="name to serve under instead of hub id or folder name")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights, for measuring without their files; answers mean nothing"
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one, see the LISTENING line")
    drain_timeout_s: float = Field(30.0, ge=0, description="longest wait for running work and leases at shutdown, s")

    dp: int = Field(
        1,
        ge=1,
        le=64,
        description="encoder processes, one a GPU, on port, port + 1, ... (metrics likewise)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the tower runs; auto: a GPU if any")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights and rows; auto: the checkpoint's on a GPU, float32 on the CPU"
    )

    quantization: Literal["none", "fp8"] = Field(
        "none", description="fp8: the blocks' matrix products in e4m3 (bfloat16 on a Hopper GPU or newer only)"
    )
    cuda_graphs: bool = Field(True, description="capture CUDA graphs at start-up (bfloat16 on a GPU only)")
    gpu_preprocess: bool = Field(
        True,
        description="decode JPEGs and make patches on the GPU if there is one; pixels differ by a grey level or two",
    )

    shm_folder: str = Field("/dev/shm", description="folder for the shared-memory pool; empty turns shared memory off")
    pool_bytes: int = Field(256 * MIB, ge=MIB, description="size of the shared-memory pool, bytes")
    cuda_ipc_pool_bytes: int = Field(
        1024 * MIB, ge=0, description="GPU memory that workers on this host map through CUDA IPC, bytes; 0 is off"
    )
    lease_ttl_s: float = Field(60.0, gt=0, description="how long a peer may hold rows in the pool, s")

    ticket_ttl_s: float = Field(
        120.0, gt=0, description="how long media stay in memory for rows that are claimed by ticket, s"
    )
    compute_ahead: int = Field(
        8, ge=0, description="tickets of gateways whose rows are computed before they are claimed; 0 is off"
    )

    cache_gpu_bytes: int = Field(2048 * MIB, ge=0, description="rows kept on the GPU for equal items, bytes; 0 is off")
    cache_host_bytes: int = Field(512 * MIB, ge=0, description="rows kept in host memory, bytes; 0 is off")

    max_items: int = Field(64, ge=1, description="images and videos accepted in one request")
    max_batch_patches: int = Field(
        45056, ge=4, multiple_of=4, description="patches in one batch; a larger item runs alone"
    )
    max_queued_patches: int = Field(524_288, ge=1, description="patches in work before items are refused as overload")
    max_queued_s: float = Field(30.0, gt=0, description="work, in seconds, before items are refused as overload")

    allowed_media_folder: Path | None = Field(None, description="file: URLs may name files below it; default none")
    allow_private_addresses: bool = Field(False, description="lets media URLs lead to private and loopback addresses")
    max_media_bytes: int = Field(64 * MIB, ge=1, description="size of one encoded image or video, bytes")
    max_image_pixels: int = Field(
        64 * MIB,
        ge=1,
        description="pixels in one image or video frame before resizing, and after it where a request sets bounds",
    )
    max_decoded_media_bytes: int = Field(
        2048 * MIB, ge=1, description="memory of large pictures and videos while they are decoded; others wait, bytes"
    )
    decode_timeout_s: float = Field(5.0, gt=0, description="longest decoding of one image, s of CPU time")
    video_decode_timeout_s: float = Field(
        30.0, gt=0, description="longest decoding of one video or list of frames, s of CPU time"
    )
    media_timeout_s: float = Field(30.0, gt=0, description="longest download of one item, s")

    sglang_port: int = Field(
        0, ge=0, le=65535, description="HTTP port for SGLang's language servers (docs/sglang.md); 0 is off"
    )
    sglang_version: str = Field("", description="version of the language servers, such as 0.5.20")
    sglang_receivers: str = Field(
        "",
        description="where rows may be pushed to, separated by commas: address, network (CIDR) or host name, each with "
        ":PORT or :FIRST-LAST behind it or none for all ports; empty allows none",
    )
    sglang_register: str = Field(
        "",
        description="language servers to register with, separated by commas: http://HOST:8997, or a form of a worker's "
        "--encoders with that port",
    )
    sglang_advertise_host: str = Field("", description="host that language servers reach this one by; default: --host")
    sglang_timeout_s: float = Field(
        180.0, gt=0, description="longest time of one part of a request until it is delivered, s"
    )
    sglang_max_held_bytes: int = Field(
        4096 * MIB,
        ge=1,
        description="SGLang's requests and undelivered rows before more are refused, bytes",
    )
    sglang_peers: str = Field(
        "",
        description="gRPC addresses of all encoders of the fleet, this one included, in the forms of a worker's "
        "--encoders: each item is encoded where equal ones are; empty: all here",
    )
    sglang_peers_ca_file: Path | None = Field(None, description="CA that signs the peers' certificates; none: no TLS")
    sglang_peers_server_name: str | None = Field(
        None, description="name in the peers' certificates, where they are reached by another one"
    )

    def media_limits(self) -> MediaLimits:
        """Raises ValueError where `allowed_media_folder` is no folder."""
        return MediaLimits(
            max_bytes=self.max_media_bytes,
            max_pixels=self.max_image_pixels,
            timeout_s=self.media_timeout_s,
            allowed_folder=self.allowed_media_folder,
            allow_private_addresses=self.allow_private_addresses,
        )

"""vLLM's encoder-cache connector for Vitrine's encoders.

vLLM makes one object in the process of its scheduler and one in each worker; each has one of the two sides. What a side
does stands in `scheduler_side` and `worker_side`; here is the translation from vLLM's interface.
Source: vLLM 0.32, vllm/distributed/ec_transfer/ec_connector/base.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from vitrine_vlm.service_runtime.log_limits import LimitedLines
from vitrine_vlm.vllm_connector.channel_path import make_private_folder, remove_folder, socket_path
from vitrine_vlm.vllm_connector.deliveries import Deliveries
from vitrine_vlm.vllm_connector.fetching import Fetcher
from vitrine_vlm.vllm_connector.messages import StepCommands
from vitrine_vlm.vllm_connector.model_check import served_model
from vitrine_vlm.vllm_connector.scheduler_side import EngineFacts, SchedulerSide
from vitrine_vlm.vllm_connector.settings import ConnectorSettings
from vitrine_vlm.vllm_connector.stats import StatsCollector
from vitrine_vlm.vllm_connector.versions import warn_if_unknown
from vitrine_vlm.vllm_connector.vllm_types import VllmRequest
from vitrine_vlm.vllm_connector.worker_side import WorkerSide

_log = logging.getLogger(__name__)


def _load_metrics() -> Any:
    """Returns the module of the metrics; None with vLLM 0.30, which has none of such connectors."""
    try:
        from vitrine_vlm.vllm_connector import metrics
    except ImportError:
        return None
    return metrics


_metrics = _load_metrics()


@dataclass
class StepMetadata(ECConnectorMetadata):
    """Travels with a step from the scheduler to the workers."""

    commands: StepCommands


class VitrineConnector(ECConnectorBase):
    """
    Raises:
        ValueError: settings, or a configuration of vLLM, that the connector cannot work with.
        VitrineError: an encoder that answers cannot serve vLLM's model.
    """

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        _log_as_vllm_does()
        settings = ConnectorSettings.from_extra_config(vllm_config.ec_transfer_config.ec_connector_extra_config)
        _check_configuration(vllm_config)
        self._path = _socket_path(vllm_config)
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        if role is ECConnectorRole.SCHEDULER:
            warn_if_unknown(vllm.__version__)
            self._start_scheduler_side(vllm_config, settings)
        elif get_pp_group().is_first_rank:  # only the first stage embeds its input
            self._worker = WorkerSide(self._path, get_tp_group().rank_in_group, _device())

    def _start_scheduler_side(self, vllm_config: Any, settings: ConnectorSettings) -> None:
        model = served_model(
            vllm_config.model_config, str(vllm_config.load_config.load_format), settings.check_revision
        )
        num_workers = vllm_config.parallel_config.tensor_parallel_size
        make_private_folder(self._path)
        self._fetcher = Fetcher(settings, model.row_format, num_workers, self._path, model.check)
        self._stats = StatsCollector()
        facts = EngineFacts(
            row_format=model.row_format,
            pixels_normalized=not vllm_config.model_config.multimodal_config.mm_device_do_normalize,
            step_tokens=vllm_config.scheduler_config.max_num_batched_tokens + 1 + vllm_config.num_speculative_tokens,
            merge_size=model.merge_size,
        )
        deliveries = Deliveries(self._fetcher, settings.max_landed_bytes, self._stats)
        self._scheduler = SchedulerSide(settings, facts, deliveries)
        try:
            self._fetcher.start()
        except BaseException:
            remove_folder(self._path)
            raise

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._fetcher.close()
            remove_folder(self._path)

    # In the process of the scheduler.

    def ensure_cache_available(self, request: VllmRequest, num_computed_tokens: int) -> bool:
        return self._scheduler_side.ensure_available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler_side.has_rows(identifier)

    def update_state_after_alloc(self, request: VllmRequest, index: int) -> None:
        self._scheduler_side.allocated(request.mm_features[index])

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata(
            self._scheduler_side.take_step_commands(
                scheduler_output.free_encoder_mm_hashes, scheduler_output.total_num_scheduled_tokens
            )
        )

    def request_finished(self, request: VllmRequest) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler_side.finished(request.request_id)
        return False, None

    def take_unavailable_requests(self) -> set[str]:
        return self._scheduler_side.take_unavailable()

    def get_ec_connector_stats(self) -> Any:
        report = None if self._scheduler is None or _metrics is None else self._stats.take_report()
        return None if report is None else _metrics.ConnectorStats(report)

    # In a worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        if self._worker is not None:
            self._worker.start_step(metadata.commands, encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Does nothing: what vLLM's own tower has encoded stays there."""

    # In the process of the API server.

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return None if _metrics is None else _metrics.ConnectorStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        if _metrics is None:
            return None
        return _metrics.ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None, "called in a worker"
        return self._scheduler


def _check_configuration(vllm_config: Any) -> None:
    """
    Raises:
        ValueError: names what cannot work, and what to do.
    """
    transfer, parallel = vllm_config.ec_transfer_config, vllm_config.parallel_config
    if transfer.ec_role != "ec_consumer":
        raise ValueError(
            f"VitrineConnector only receives embeddings: ec_role must be ec_consumer, not {transfer.ec_role}"
        )
    if parallel.nnodes > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            f"VitrineConnector needs all workers on one host and no prefill context parallelism: nnodes is "
            f"{parallel.nnodes}, prefill_context_parallel_size {parallel.prefill_context_parallel_size}"
        )
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is None:
        raise ValueError("VitrineConnector needs a vision-language model; this vLLM serves text alone")
    if multimodal.mm_processor_cache_type == "shm":
        raise ValueError("VitrineConnector cannot read pixels with --mm-processor-cache-type shm: use lru, the default")
    if multimodal.is_multimodal_pruning_enabled():
        raise ValueError("Vitrine's encoders do not prune videos: start vLLM without --video-pruning-rate")


def _log_as_vllm_does() -> None:
    """Sends Vitrine's log lines where vLLM's go, within limits, unless the operator has configured them."""
    own, of_vllm = logging.getLogger("vitrine_vlm"), logging.getLogger("vllm")
    if not own.handlers and own.level == logging.NOTSET:
        own.handlers, own.propagate = [LimitedLines(of_vllm)], False
        own.setLevel(of_vllm.level)


def _socket_path(vllm_config: Any) -> Path:
    # Data-parallel engines have the same engine_id.
    engine_id, index = vllm_config.ec_transfer_config.engine_id, vllm_config.parallel_config.data_parallel_index
    return socket_path(f"{engine_id}/{index}")


def _device() -> torch.device:
    """Returns the device of this worker.

    Raises:
        ValueError: rows cannot be landed on devices of this kind.
    """
    from vllm.platforms import current_platform

    if current_platform.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if current_platform.device_type == "cpu":
        return torch.device("cpu")
    raise ValueError(f"VitrineConnector lands rows on GPUs and CPUs, not on {current_platform.device_type!r}")

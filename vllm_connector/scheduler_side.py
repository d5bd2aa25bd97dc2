"""The connector in vLLM's EngineCore: decides for each request which rows it needs, and whether they are there.

Every method is called by vLLM's scheduler, on its thread, and none blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import MediaItem
from vitrine_vlm.vllm_connector.deliveries import Deliveries, Delivery, Status
from vitrine_vlm.vllm_connector.fetching import FetchOrder, RowFormat
from vitrine_vlm.vllm_connector.media_items import check_grid, has_pixels, needs_tower, patches_item, ticket_params
from vitrine_vlm.vllm_connector.messages import StepCommands
from vitrine_vlm.vllm_connector.settings import ConnectorSettings
from vitrine_vlm.vllm_connector.vllm_types import Feature, VllmRequest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineFacts:
    """What the scheduler's side needs to know of vLLM's configuration.

    row_format: of the rows in the encoder cache.
    pixels_normalized: whether pixels are scaled and normalized before they get here.
    step_tokens: no step computes more tokens of one request than this.
    merge_size: patches along a side of one token.
    """

    row_format: RowFormat
    pixels_normalized: bool
    step_tokens: int
    merge_size: int

    @property
    def row_nbytes(self) -> int:
        return self.row_format.row_width * DTYPES[self.row_format.dtype].itemsize


class SchedulerSide:
    """Mode P: an item with pixels is encoded by Vitrine, or else by vLLM's own tower. Mode M: an item with a ticket has
    no other source than Vitrine; its request fails without it.
    """

    def __init__(self, settings: ConnectorSettings, facts: EngineFacts, deliveries: Deliveries) -> None:
        self._settings, self._facts, self._deliveries = settings, facts, deliveries
        # Identifiers in vLLM's encoder cache, but for evictions since the last step. Good enough where vLLM's own tower
        # is the worst that comes of an error; an item without pixels must have its rows here.
        self._cached: dict[str, int] = {}  # with the number of their rows
        self._loads: dict[str, int] = {}
        self._unavailable: set[str] = set()
        self._checked: set[str] = set()  # requests whose grids are those of images and videos
        self._last_error = ""

    def ensure_available(self, request: VllmRequest, num_computed_tokens: int) -> bool:
        """Starts to fetch what the request needs beyond its computed tokens.

        Returns False while an item that its next step may need is pending. True for an item that has failed means that
        `has_rows` is False for it, and that vLLM's own tower encodes it.
        """
        request_id, features, deliveries = request.request_id, request.mm_features, self._deliveries
        if not self._is_well_formed(request):
            self._unavailable.add(request_id)
            return False
        needed: dict[str, Feature] = {}
        for feature in features:
            if _end(feature) > num_computed_tokens and needs_tower(feature):
                if not self._has_its_names_size(feature, needed):
                    self._unavailable.add(request_id)
                    return False
                needed.setdefault(feature.identifier, feature)
        deliveries.release(request_id, set(needed))
        if not needed:
            return True
        deliveries.receive_results()
        is_available = True
        for identifier, feature in needed.items():
            delivery = deliveries.get(identifier)
            if delivery is None:
                if identifier in self._cached and has_pixels(feature):
                    continue
                delivery = self._begin(request, feature)
            urgent = feature.mm_position.offset < num_computed_tokens + self._facts.step_tokens
            deliveries.hold(request_id, delivery, urgent)
            if deliveries.is_late(delivery):
                deliveries.fail(delivery, f"its rows were {delivery.status.value} and not there in time")
            if delivery.status is Status.FAILED and not delivery.has_own_tower and request_id not in delivery.tried:
                # By the ticket of another request with an equal item: this one may have a better one.
                self._begin(request, feature, delivery)
            if delivery.status is Status.FAILED:
                # Requests with and without pixels can share an item, if clients name it.
                has_own_tower = has_pixels(feature)
                self._log_failure(request_id, delivery, has_own_tower)
                if not has_own_tower:
                    self._unavailable.add(request_id)
                    is_available = False
            elif delivery.pending and urgent:
                is_available = False
        deliveries.admit()
        return is_available

    def has_rows(self, identifier: str) -> bool:
        """Whether the rows have landed in all workers; vLLM then loads them instead of running its tower."""
        delivery = self._deliveries.get(identifier)
        return delivery is not None and delivery.status is Status.LANDED

    def allocated(self, feature: Feature) -> None:
        """vLLM's encoder cache has a place for the item from this step on, which loads or encodes it."""
        identifier = feature.identifier
        self._cached[identifier] = feature.mm_position.get_num_embeds()
        delivery = self._deliveries.get(identifier)
        if delivery is not None and delivery.status is Status.LANDED:
            delivery.is_loaded = True
            self._loads[identifier] = delivery.order.delivery_id

    def take_step_commands(self, evicted: Iterable[str], num_tokens: int) -> StepCommands:
        """Returns the commands of the step that was just scheduled.

        Args:
            evicted: identifiers that vLLM evicts from its encoder cache.
            num_tokens: tokens that the step computes; workers may not see a step without any.
        """
        for identifier in evicted:
            self._cached.pop(identifier, None)
        if not num_tokens:
            return StepCommands({}, [])
        loads, self._loads = self._loads, {}
        return StepCommands(loads, self._deliveries.take_discards())

    def finished(self, request_id: str) -> None:
        """The request has ended, also by an abort: what only it needs is cancelled and freed."""
        self._deliveries.release(request_id)
        self._deliveries.receive_results()
        self._deliveries.admit()
        self._unavailable.discard(request_id)
        self._checked.discard(request_id)

    def take_unavailable(self) -> set[str]:
        """Returns the ids of requests that cannot go on, because an item without another source has failed."""
        unavailable, self._unavailable = self._unavailable, set()
        return unavailable

    def _is_well_formed(self, request: VllmRequest) -> bool:
        """Also of what the prefix cache covers: vLLM positions the whole prompt once it computes any of it."""
        if request.request_id in self._checked:
            return True
        try:
            for feature in request.mm_features:
                check_grid(feature, self._facts.merge_size)
        except BadRequest as error:
            _log.warning("request %s: %s; the request fails", request.request_id, error)
            return False
        self._checked.add(request.request_id)
        return True

    def _has_its_names_size(self, feature: Feature, needed: Mapping[str, Feature]) -> bool:
        """Whether rows of this identifier, wherever they are, are as many as the item's tokens; others end the engine.

        Clients may give two items one uuid, and vLLM does not compare what it has under it.
        """
        identifier, num_tokens = feature.identifier, feature.mm_position.get_num_embeds()
        delivery, other = self._deliveries.get(identifier), needed.get(identifier)
        if other is not None:
            num_rows = other.mm_position.get_num_embeds()
        elif delivery is not None:
            num_rows = delivery.order.num_tokens
        else:
            num_rows = self._cached.get(identifier, num_tokens)
        if num_rows != num_tokens:
            _log.warning(
                "item %s of %d tokens has the uuid of one of %d; the request fails", identifier, num_tokens, num_rows
            )
        return num_rows == num_tokens

    def _begin(self, request: VllmRequest, feature: Feature, failed: Delivery | None = None) -> Delivery:
        """Begins to deliver the request's item; `failed` is what another request's order came to, if there is one."""
        settings, facts = self._settings, self._facts
        has_own_tower = has_pixels(feature)
        num_tokens = feature.mm_position.get_num_embeds()
        error = ""
        tenant = CacheScope(settings.tenant, request.cache_salt or "").encoder_tenant
        make_item: Callable[[], MediaItem] = partial(patches_item, feature, facts.pixels_normalized)
        try:
            params = ticket_params(feature, request.ec_transfer_params)
            if params is not None:
                make_item, tenant = params.item, params.tenant
            elif not has_own_tower:
                error = "the item is metadata alone, without ec_transfer_params: send the request to vitrine-gateway"
        except BadRequest as bad:
            error = str(bad)

        def make_order(delivery_id: int) -> FetchOrder:
            return FetchOrder(delivery_id, request.request_id, tenant, num_tokens, make_item)

        timeout_s = settings.deliver_timeout_s if has_own_tower else settings.encode_timeout_s
        nbytes = num_tokens * facts.row_nbytes
        if failed is None:
            delivery = self._deliveries.begin(feature.identifier, make_order, nbytes, timeout_s, has_own_tower)
        else:
            delivery = failed
            self._deliveries.begin_again(delivery, make_order, timeout_s)
        if error:
            self._deliveries.fail(delivery, error)
        return delivery

    def _log_failure(self, request_id: str, delivery: Delivery, has_own_tower: bool) -> None:
        level = logging.DEBUG if delivery.error == self._last_error else logging.WARNING
        self._last_error = delivery.error
        consequence = "vLLM's own tower encodes it" if has_own_tower else "the request fails"
        _log.log(level, "request %s, item %s: %s; %s", request_id, delivery.identifier, delivery.error, consequence)


def _end(feature: Feature) -> int:
    return feature.mm_position.offset + feature.mm_position.length

"""Discovers the addresses of encoders: fixed addresses, DNS names, a file, or Kubernetes' EndpointSlices.

Each source yields all its addresses whenever they may have changed; a source that cannot be read right now yields
nothing, so its last addresses stay in use. Whether an encoder is usable is found out by connecting to it.
"""

from vitrine_vlm.embedding_transport.fleet.discovery.sources import Source, parse_sources, watch_sources

__all__ = ["Source", "parse_sources", "watch_sources"]

"""Where encoders are: fixed addresses, names in DNS, a file, or Kubernetes' EndpointSlices.

Each source yields all its addresses whenever they may have changed; what cannot be asked right now leaves things as
they are. Whether an encoder can be used is not decided here: connections find that out.
"""

from vitrine_vlm.embedding_transport.fleet.discovery.sources import Source, follow, parse_sources

__all__ = ["Source", "follow", "parse_sources"]

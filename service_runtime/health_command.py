"""`vitrine-health HOST:PORT`: checks whether a service is ready, for container probes. Exit code 0: it is ready."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from vitrine_vlm import __version__
from vitrine_vlm.service_runtime.health import health_status
from vitrine_vlm.service_runtime.tls import ClientTls


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="vitrine-health")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("address", metavar="HOST:PORT", help="of the gRPC port")
    parser.add_argument("--service", default="", help="full name of the gRPC service; default: all services")
    parser.add_argument("--timeout-s", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--ca-file", type=Path, help="CA of the service's certificate (PEM); none: no TLS")
    parser.add_argument("--cert-file", type=Path, help="certificate for a service that requires one (PEM)")
    parser.add_argument("--key-file", type=Path, help="its private key (PEM)")
    parser.add_argument("--server-name", help="name in the service's certificate, where it is not that of HOST")
    options = parser.parse_args(arguments)
    tls = None
    if options.ca_file:
        tls = ClientTls(options.ca_file, options.cert_file, options.key_file, options.server_name)
    try:
        status = asyncio.run(health_status(options.address, options.timeout_s, options.service, tls))
    except (OSError, grpc.aio.AioRpcError) as error:
        reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
        print(f"{options.address}: {reason}", file=sys.stderr)
        return 1
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())

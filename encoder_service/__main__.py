"""`python -m encoder_service --model ... --port ...`"""

from __future__ import annotations

import asyncio
import logging
import sys

from pydantic import ValidationError

from embedding_transport.checkpoint import CheckpointError
from embedding_transport.errors import VitrineError
from encoder_service.app import serve
from encoder_service.config import EncoderConfig


def main() -> int:
    """Runs an encoder; 0 after an orderly stop, 1 where it could not start, 2 for bad settings."""
    try:
        config = EncoderConfig.from_command_line(sys.argv[1:])
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            print(f"{flag}: {problem['msg']}; see --help", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(serve(config))
    except (CheckpointError, OSError, ValueError, VitrineError) as error:
        logging.getLogger("encoder_service").error("cannot start: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

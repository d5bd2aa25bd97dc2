"""`python -m llm_worker --model ... --encoders host:port,...`"""

from __future__ import annotations

import asyncio
import logging
import sys

from pydantic import ValidationError

from embedding_transport.checkpoint import CheckpointError
from embedding_transport.errors import VitrineError
from llm_worker.app import serve
from llm_worker.config import LlmConfig


def main() -> int:
    """Runs an LLM worker; 0 after an orderly stop, 1 where it could not start, 2 for bad settings."""
    try:
        config = LlmConfig.from_command_line(sys.argv[1:])
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            print(f"{flag}: {problem['msg']}; see --help", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(serve(config))
    except (CheckpointError, OSError, ValueError, VitrineError) as error:
        logging.getLogger("llm_worker").error("cannot start: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

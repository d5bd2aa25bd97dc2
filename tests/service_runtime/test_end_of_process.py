"""A service that has stopped is gone, whatever the interpreter would still have to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVICE = """
import atexit, logging, sys, time
from pydantic_settings import SettingsConfigDict
from vitrine_vlm.service_runtime.settings import ServiceSettings, run_service
from vitrine_vlm.service_runtime.supervisor import ServiceFailed

class Settings(ServiceSettings):
    service_name = "service"
    model_config = SettingsConfigDict(env_prefix="END_OF_PROCESS_")

async def serve(settings):
    atexit.register(time.sleep, 300)
    print("printed")
    logging.getLogger("service").info("stopped")
    if how == "fails":
        raise ServiceFailed("a loop ended")

how = sys.argv.pop()
sys.exit(run_service(Settings, serve, ()))
"""


@pytest.mark.parametrize(("how", "status"), [("stops", 0), ("fails", 1)])
def test_nothing_of_the_interpreter_delays_the_end_of_a_service(how: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", SERVICE, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "printed\n")
    assert "stopped" in done.stderr and ("a loop ended" in done.stderr) == (how == "fails")

"""`vitrine run` and `vitrine serve`: the whole system on one machine, one encoder and one LLM worker."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from vitrine_vlm import __version__
from vitrine_vlm.deploy.launcher.ask import AskFailed, ask, served_model
from vitrine_vlm.deploy.launcher.picture import DRAWN_PICTURE, picture_url
from vitrine_vlm.deploy.launcher.report import stage_table
from vitrine_vlm.deploy.launcher.stack import Stack
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER
from vitrine_vlm.service_runtime.child_process import ChildFailed

_PROMPT = "What shapes and colors are in this picture?"
_INTERRUPTED = 130
_CURL_EXAMPLE = """
  curl -sN {base_url}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model}", "stream": true, "max_tokens": 64,
    "messages": [{{"role": "user", "content": [
      {{"type": "image_url", "image_url": {{"url": "https://example.com/your-picture.jpg"}}}},
      {{"type": "text", "text": "What is in this picture?"}}]}}]}}'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_interruptible(options))
    except (ChildFailed, AskFailed, aiohttp.ClientError, BrokenPipeError, ValueError) as error:
        print(f"vitrine: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitrine", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="ask one question about a picture, print answer and timings, stop")
    serve = commands.add_parser("serve", help="serve an OpenAI endpoint until Ctrl-C")
    for command in (run, serve):
        command.add_argument("--model", help="checkpoint folder or hub id; default: the small one shipped along")
        command.add_argument("--no-mps", action="store_true", help="take turns on the GPU, without CUDA's MPS")
    run.add_argument("--image", help="file or http(s) address; default: a picture drawn on the spot")
    run.add_argument("--prompt", default=_PROMPT, help="question about the picture; default: %(default)s")
    run.add_argument("--max-tokens", type=int, default=64, help="longest answer, in tokens; default: %(default)s")
    serve.add_argument("--port", type=int, default=8000, help="HTTP port; default: %(default)s")
    serve.add_argument("--grpc-port", type=int, default=50052, help="gRPC port; default: %(default)s")
    return parser


async def _interruptible(options: argparse.Namespace) -> int:
    """Runs the command as a task that SIGINT and SIGTERM cancel, so that the services are stopped on every way out."""
    command = asyncio.create_task(_run(options) if options.command == "run" else _serve(options))
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, command.cancel)
    try:
        await command
    except asyncio.CancelledError:
        _say("stopped")
        return 0 if options.command == "serve" else _INTERRUPTED
    return 0


async def _run(options: argparse.Namespace) -> None:
    url = picture_url(options.image)
    async with Stack.running(_model(options.model), may_use_mps=not options.no_mps) as stack:
        await _wait_ready(stack)
        _say(f"picture: {options.image or DRAWN_PICTURE}")
        _say(f"question: {options.prompt}")
        with stack.output_held():
            print("\nanswer: ", end="", flush=True)
            asking = ask(stack.base_url, url, options.prompt, max_tokens=options.max_tokens, show=_show_piece)
            answer = await stack.unless_failed(asking)
            print(f"\n\n{stage_table(answer)}\n", flush=True)
        _say("stopping the services")


async def _serve(options: argparse.Namespace) -> None:
    model, ports = _model(options.model), (options.port, options.grpc_port)
    async with Stack.running(model, *ports, may_use_mps=not options.no_mps) as stack:
        await _wait_ready(stack)
        name = await served_model(stack.base_url)
        print(_CURL_EXAMPLE.format(base_url=stack.base_url, model=name), flush=True)
        _say(f"gRPC endpoint: {stack.grpc_address} (vitrine.llm.v1.Llm)")
        _say(f"live page: {stack.base_url}/dashboard")
        _say(f"OpenAI endpoint: {stack.base_url}/v1 (Ctrl-C stops it)")
        await stack.unless_failed(asyncio.Event().wait())


def _model(model: str | None) -> str | Path:
    if model:
        return model
    _say("no MODEL given: using the tiny one shipped along, which knows shapes, printed words, digits and moving balls")
    return MODEL_FOLDER


async def _wait_ready(stack: Stack) -> None:
    start = time.perf_counter()
    _say("starting the encoder and the LLM worker" + (", which share GPUs by CUDA's MPS" if stack.mps else ""))
    await stack.wait_ready()
    _say(f"ready after {time.perf_counter() - start:.1f} s")


def _show_piece(text: str) -> None:
    print(text, end="", flush=True)


def _say(message: str) -> None:
    print(f"vitrine: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Flags win over the environment, which wins over defaults; values that make no sense are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vitrine_vlm.llm_worker.__main__ import main
from vitrine_vlm.llm_worker.config import LlmConfig

read = LlmConfig.from_command_line
NEEDED = ["--model", "m", "--encoders", "a:1"]


def test_flags_win_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_LLM_PORT", "1234")
    monkeypatch.setenv("VITRINE_LLM_MAX_ITEMS", "3")
    config = read([*NEEDED, "--port", "4321"])
    assert (config.port, config.max_items, config.host, config.transport) == (4321, 3, "127.0.0.1", "auto")


@pytest.mark.parametrize("flags", [["--modell", "m"], ["--max-item", "1"], ["extra"]])
def test_unknown_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read([*NEEDED, *flags])
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--grpc-port", "http"],
        ["--transport", "rdma"],
        ["--dtype", "float8"],
        ["--kv-cache-dtype", "bfloat16"],
        ["--max-num-seqs", "0"],
        ["--kv-cache-tokens", "15"],
        ["--encode-timeout-s", "0"],
        ["--tp", "0"],
        ["--encoders", ""],
        ["--encoders", "host"],
        ["--encoders", "a:1,b"],
        ["--encoders", "a:1,,b:2"],
        ["--encoders", "a:9-5"],
        ["--encoders", "a:1-99"],
        ["--encoders", "dns:name"],
        ["--encoders", "dns:name:port"],
        ["--encoders", "kubernetes:service:1"],
        ["--encoders", "kubernetes:namespace/service"],
        ["--role", "encode"],
        ["--pool-bytes", "1000"],
        ["--lease-ttl-s", "0"],
        ["--api-key", "short"],
        ["--metrics-host", "127.0.0.1"],
        ["--tenant-header", "two words"],
        ["--role", "prefill", "--api-key", "a-key-of-some-length"],
        ["--role", "prefill", "--api-keys-file", "keys.yaml"],
    ],
)
def test_values_out_of_range_are_refused(flags: list[str]) -> None:
    with pytest.raises((ValidationError, SystemExit)):
        read([*NEEDED, *flags])


@pytest.mark.parametrize(("asked", "actual"), [(None, 4096), (100, 100), (9999, 4096)])
def test_the_context_is_never_longer_than_the_models(asked: int | None, actual: int) -> None:
    flags = [] if asked is None else ["--max-model-len", str(asked)]
    assert (
        read([*NEEDED, *flags]).engine_config(max_position_embeddings=4096, kv_tokens_that_fit=100).max_model_len
        == actual
    )


def test_the_kv_cache_is_counted_in_tokens() -> None:
    config = read([*NEEDED, "--kv-cache-tokens", "1000"]).engine_config(4096, 5000)
    assert 1000 - config.block_size < config.num_blocks * config.block_size <= 1000


def test_the_kv_cache_has_the_dtype_that_is_asked_for() -> None:
    assert read(NEEDED).engine_config(4096, 5000).kv_cache_dtype == "auto"
    assert read([*NEEDED, "--kv-cache-dtype", "fp8"]).engine_config(4096, 5000).kv_cache_dtype == "fp8"


def test_whole_blocks_hold_the_longest_requests() -> None:
    config = read([*NEEDED, "--max-model-len", "1000", "--max-num-seqs", "3"]).engine_config(4096, 5000)
    assert config.num_blocks == 3 * 63
    config = read([*NEEDED, "--max-model-len", "1000", "--max-num-seqs", "3"]).engine_config(4096, 2999)
    assert config.num_blocks == 2999 // 16


def test_a_config_cannot_be_changed() -> None:
    config = read(NEEDED)
    with pytest.raises(ValidationError):
        config.port = 1  # type: ignore[misc]


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name, field in LlmConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description and field.description.split()[0] in shown


def test_missing_flags_are_reported_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["llm_worker"])
    assert main() == 2
    assert capsys.readouterr().err == "--model: Field required; see --help\n"


@pytest.mark.parametrize(
    ("flags", "needed", "refused"),
    [
        ([], "--encoders", "--prefill-workers"),
        (["--role", "prefill"], "--encoders", "--prefill-workers"),
        (["--encoders", "a:1", "--prefill-workers", "b:1"], "--encoders", "--prefill-workers"),
        (["--role", "decode"], "--prefill-workers", "--encoders"),
        (["--role", "decode", "--encoders", "a:1"], "--prefill-workers", "--encoders"),
        (["--role", "decode", "--encoders", "a:1", "--prefill-workers", "b:1"], "--prefill-workers", "--encoders"),
    ],
)
def test_a_role_needs_addresses_of_its_own_kind_only(
    flags: list[str], needed: str, refused: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["llm_worker", "--model", "m", *flags])
    assert main() == 2
    said = capsys.readouterr().err
    assert f"needs {needed}, and takes no {refused}" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_tensor_parallel_workers_exchange_no_kv(
    role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = ["--prefill-workers" if role == "decode" else "--encoders", "a:1"]
    monkeypatch.setattr("sys.argv", ["llm_worker", "--model", "m", "--role", role, *peers, "--tp", "2"])
    assert main() == 2
    said = capsys.readouterr().err
    assert f"--role {role} needs --tp 1, not 2" in said
    assert len(said.splitlines()) == 1


def test_a_pool_on_the_gpu_is_a_prefill_workers() -> None:
    pool = ["--cuda-ipc-pool-bytes", "1000"]
    assert read([*NEEDED, *pool]).pool_gpu_nbytes == 0
    assert read([*NEEDED, *pool, "--role", "prefill"]).pool_gpu_nbytes == 1000


def test_a_decode_workers_sources_are_its_prefill_workers() -> None:
    config = read(["--model", "m", "--role", "decode", "--prefill-workers", "a:1-2,dns:b:50052"])
    assert len(config.sources()) == 2

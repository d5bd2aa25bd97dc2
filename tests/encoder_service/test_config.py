"""Flags win over the environment, then comes the file, then the defaults; invalid values are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from vitrine_vlm.encoder_service.__main__ import main
from vitrine_vlm.encoder_service.config import EncoderConfig

read = EncoderConfig.from_command_line


def test_flags_win_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_ENCODER_PORT", "1234")
    monkeypatch.setenv("VITRINE_ENCODER_MAX_ITEMS", "3")
    config = read(["--model", "m", "--port", "4321"])
    assert (config.port, config.max_items, config.host) == (4321, 3, "127.0.0.1")


def test_a_file_comes_after_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "encoder.yaml"
    file.write_text("model: m\nport: 1\nmax_items: 2\nmax_batch_patches: 4\nallowed_media_folder: /media\n")
    monkeypatch.setenv("VITRINE_ENCODER_MAX_ITEMS", "20")
    monkeypatch.setenv("VITRINE_ENCODER_MAX_BATCH_PATCHES", "40")
    config = read(["--config", str(file), "--max-batch-patches", "300"])
    assert (config.port, config.max_items, config.max_batch_patches) == (1, 20, 300)
    assert config.allowed_media_folder == Path("/media")
    monkeypatch.setenv("VITRINE_ENCODER_CONFIG", str(file))
    assert read([]).port == 1
    assert read(["--port", "4"]).port == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [("model: m\nmax_item: 1\n", "--max-item: Extra inputs"), ("- model\n", "not a list"), ("model: [", "line 1")],
)
def test_a_bad_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    monkeypatch.setattr("sys.argv", ["encoder", "--config", str(tmp_path / "bad.yaml")])
    assert main() == 2
    assert message in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["encoder", "--config", str(tmp_path / "none.yaml")])
    assert main() == 2
    assert "there is no such file" in capsys.readouterr().err


def test_what_is_in_force_can_be_printed_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["encoder", "--model", "m", "--no-cuda-graphs", "--port", "7", "--print-config"])
    assert main() == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = read(["--config", str(printed)])
    expected = read(["--model", "m", "--no-cuda-graphs", "--port", "7"])
    assert again.model_dump(exclude={"config"}) == expected.model_dump(exclude={"config"})


def test_what_is_printed_says_where_each_value_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "encoder.yaml"
    file.write_text("model: m\nport: 1\nmax_items: 3\nlog_level: error\n")
    monkeypatch.setenv("VITRINE_ENCODER_LOG_LEVEL", "debug")
    monkeypatch.setenv("VITRINE_ENCODER_PORT", "2")
    monkeypatch.setattr(
        "sys.argv", ["encoder", "--config", str(file), "--port", "7", "--no-cuda-graphs", "--print-config"]
    )
    assert main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert {
        f"model: m  # file {file}",
        f"max_items: 3  # file {file}",
        "log_level: debug  # environment VITRINE_ENCODER_LOG_LEVEL",
        "port: 7  # flag --port",
        "cuda_graphs: false  # flag --cuda-graphs",
        "log_format: text  # default",
    } <= set(printed)


@pytest.mark.parametrize("flags", [["--tls-cert-file", "c"], ["--tls-key-file", "k"], ["--tls-client-ca-file", "a"]])
def test_half_of_a_certificate_is_refused(flags: list[str]) -> None:
    with pytest.raises(ValueError, match="both --tls-cert-file and --tls-key-file"):
        read(["--model", "m", *flags]).server_tls()


def test_the_environment_can_name_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_ENCODER_MODEL", "Qwen/Qwen3-VL-2B-Instruct")
    assert read([]).model == "Qwen/Qwen3-VL-2B-Instruct"


@pytest.mark.parametrize("flags", [["--modell", "m"], ["--model", "m", "--max-item", "1"], ["--model", "m", "extra"]])
def test_unknown_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(flags)
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_unknown_environment_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VITRINE_ENCODER_MAX_ITEM", "3")
    monkeypatch.setenv("VITRINE_LLM_MAX_WAITING", "3")  # another service's
    monkeypatch.setattr("sys.argv", ["encoder_service", "--model", "m", "--print-config"])
    assert main() == 2
    said = capsys.readouterr().err
    assert "VITRINE_ENCODER_MAX_ITEM:" in said and "VITRINE_LLM" not in said
    with pytest.raises(SystemExit) as stopped:
        read(["--help"])
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--port", "http"],
        ["--max-items", "0"],
        ["--device", "tpu"],
        ["--dtype", "float8"],
        ["--lease-ttl-s", "0"],
        ["--media-timeout-s", "-1"],
    ],
)
def test_values_out_of_range_are_refused(flags: list[str]) -> None:
    with pytest.raises((ValidationError, SystemExit)):
        read(["--model", "m", *flags])


def test_a_config_cannot_be_changed() -> None:
    config = read(["--model", "m"])
    with pytest.raises(ValidationError):
        config.port = 1  # type: ignore[misc]


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name, field in EncoderConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description and field.description.split()[0] in shown


def test_media_limits_follow_the_flags(tmp_path: Path) -> None:
    flags = ["--allowed-media-folder", str(tmp_path), "--allow-private-addresses", "--max-media-bytes", "10"]
    limits = read(["--model", "m", *flags]).media_limits()
    assert limits.allowed_folder == tmp_path
    assert limits.allow_private_addresses
    assert limits.max_bytes == 10


def test_a_missing_model_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["encoder_service"])
    assert main() == 2
    assert capsys.readouterr().err == "--model: Field required; see --help\n"

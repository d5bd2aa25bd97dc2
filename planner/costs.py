"""What a GPU takes: the costs that a plan is made with, measured, scaled from measured ones, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts
from vitrine_vlm.simulation.costs import MEASURED, Hardware

# 32 pictures of 560x560 take 2.60 ms each alone, and 2.70 to 2.73 ms beside what decodes and delivers.
_PICTURE_S = 0.11e-3
# One request at a time over HTTP has its first token so much later than its tower and its step end: 11 ms with a
# picture of 560x560 pixels, 19 ms with one of 1920x1080.
_FRONT_S, _FRONT_A_PIXEL_S = 9.5e-3, 4.7e-9


class TowerCosts(BaseModel):
    """Coefficients of the encoder's cost model, see `CostModel`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed_s: float = Field(ge=0)
    per_patch_s: float = Field(ge=0)
    per_pair_s: float = Field(ge=0)


class DecoderCosts(BaseModel):
    """The worker's cost model, see `StepCosts`: seconds of steps by tokens, and of what these attend to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_s: dict[int, float] = Field(min_length=1)
    mixed_s: dict[int, float] = Field(min_length=1)
    per_key_s: float = Field(ge=0)
    per_pair_s: float = Field(ge=0)


class Costs(BaseModel):
    """Everything that a plan has to know of a GPU and a model on it; the simulation's `GpuCosts`.

    gpu, model: names, for readers. source: where the figures come from. row_nbytes: of the embeddings of one token of a
    picture, deepstack included. picture_s: seconds of the encoder's GPU that decoding one picture takes from the
    tower. front_s, front_a_pixel_s: seconds on the host in front of a request, and in addition by its pictures' pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    model: str
    source: str
    row_nbytes: int = Field(gt=0)
    tower: TowerCosts
    decoder: DecoderCosts
    picture_s: float = Field(default=_PICTURE_S, ge=0)
    front_s: float = Field(default=_FRONT_S, ge=0)
    front_a_pixel_s: float = Field(default=_FRONT_A_PIXEL_S, ge=0)

    def tower_cost(self) -> CostModel:
        """A new cost model, as the tower is predicted by the encoder's policies."""
        return CostModel(self.tower.fixed_s, self.tower.per_patch_s, self.tower.per_pair_s)

    def real_tower_cost(self) -> CostModel:
        """What the tower really takes: with decoding beside it, which the policies learn only from batches."""
        return _TowerBesideDecoding(self.tower_cost(), self.picture_s)

    def step_costs(self) -> StepCosts:
        """A new cost model of a worker's steps."""
        of = self.decoder
        return StepCosts(of.decode_s, of.mixed_s, of.per_key_s, of.per_pair_s)


class _TowerBesideDecoding(CostModel):
    def __init__(self, tower: CostModel, picture_s: float) -> None:
        super().__init__(tower.fixed_s, tower.per_patch_s, tower.per_pair_s)
        self._picture_s = picture_s

    def batch_seconds(self, grid_thw: Sequence[GridTHW]) -> float:
        return super().batch_seconds(grid_thw) + self._picture_s * len(grid_thw)


@dataclass(frozen=True)
class Model:
    """tower, decoder: billions of parameters. row_width: values of one token's embedding, deepstack included."""

    tower: float
    decoder: float
    row_width: int


# Decoders without the embedding and the output layer; the towers of published configs.
MODELS = {
    "qwen3-vl-8b": Model(0.58, 6.95, 4 * 4096),
    "qwen3-vl-4b": Model(0.41, 3.63, 4 * 2560),
    "qwen3-vl-32b": Model(0.58, 31.2, 4 * 5120),
}
_MEASURED_MODEL = "qwen3-vl-8b"
_DTYPE_NBYTES = 2


def costs_of(gpu: str, model: str) -> Costs:
    """Costs of a GPU and a model by their names: Qwen3-VL-8B on an H200 as measured, others by scaling.

    Other GPUs are the simulation's, see `Hardware`; tower and steps take as much longer as parameters are more.
    """
    hardware, sizes, of_base = Hardware(gpu), MODELS[model], MODELS[_MEASURED_MODEL]
    tower, decoder = sizes.tower / of_base.tower, sizes.decoder / of_base.decoder
    cost, steps = hardware.tower_cost(), hardware.step_costs()
    is_measured = (hardware, model) == (MEASURED, _MEASURED_MODEL)
    return Costs(
        gpu=gpu,
        model=model,
        source="measured" if is_measured else f"scaled from {_MEASURED_MODEL} on {MEASURED.gpu}, not measured",
        row_nbytes=_DTYPE_NBYTES * sizes.row_width,
        tower=TowerCosts(
            fixed_s=tower * cost.fixed_s, per_patch_s=tower * cost.per_patch_s, per_pair_s=tower * cost.per_pair_s
        ),
        decoder=DecoderCosts(
            decode_s={size: decoder * seconds for size, seconds in steps.decode_s.items()},
            mixed_s={size: decoder * seconds for size, seconds in steps.mixed_s.items()},
            per_key_s=decoder * steps.per_key_s,
            per_pair_s=decoder * steps.per_pair_s,
        ),
        picture_s=hardware.compute_factor * _PICTURE_S,
        front_s=_FRONT_S,
        front_a_pixel_s=_FRONT_A_PIXEL_S,
    )


def read_costs(path: Path) -> Costs:
    """Reads what `vitrine-plan calibrate` has written.

    Raises:
        ValueError: the file has no costs, or figures out of range.
    """
    try:
        return Costs.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} has no costs as vitrine-plan calibrate writes them: {error}") from None

"""What the compilers of real slices make of the real models at full depth, on the meshes that `plan` recommends."""

import pytest

from deepstack_jax.known_models import KNOWN_MODELS
from deepstack_jax.models.registry import parse_config
from deepstack_jax.plan import plans
from pallas_kernels import aot

SLICES = (
    ("30b-a3b", "v5e-8"),
    ("30b-a3b", "v6e-8"),
    ("30b-a3b", "h100-4"),
    ("235b-a22b", "v5e-64"),
    ("235b-a22b", "v5p-16"),
    ("235b-a22b", "h200-8"),
)
KERNELS = {
    "tpu": {name: {f"attention_{name}", f"fused_moe_{name}"} for name in ("decode", "prefill")},
    "gpu": {name: {"mosaic_gpu_v2"} for name in ("decode", "prefill")},
}


def kind_of(target: str) -> str:
    return "tpu" if target.partition("-")[0] in aot.TPUS else "gpu"


@pytest.mark.parametrize(
    ("model", "target"), [pytest.param(*each, marks=getattr(pytest.mark, kind_of(each[1]))) for each in SLICES]
)
def test_the_model_fits_with_its_kernels_and_few_collectives(model: str, target: str):
    plan = next(plans(parse_config(KNOWN_MODELS[model]), target))
    assert plan.fits, plan.why
    assert plan.kv_tokens > 32 * 4096
    for name, program in plan.programs.items():
        exchanged = any(each.startswith("all-to-all") for each in program.collectives)
        assert exchanged == (target == "v5e-64" and name == "prefill")  # beyond 16 devices
        assert program.collectives_per_layer <= (5 if exchanged else 3), program.collectives
        assert set(program.kernels) >= KERNELS[kind_of(target)][name]
        assert program.pages_in_place
        # weights are bfloat16, and what devices exchange is float32
        assert not any(each.startswith("all-gather bf16") for each in program.collectives), program.collectives


@pytest.mark.tpu
def test_every_slice_has_a_shape_or_is_refused_with_those_that_have():
    for name in ("v5e-3", "v5p-3", "v9-8", "v5e", "h100-0"):
        with pytest.raises(ValueError, match=r"^(there is no|no target) [^\n]*(comes with|chips are)[^\n]*$"):
            aot.slice_devices(name)

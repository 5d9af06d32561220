"""What the real model's programs launch on Hopper: one CUDA graph per decoding step, and no loop of the host."""

import pytest

from deepstack_jax.programs import decode_loop, prefill_chunk
from deepstack_jax.testing.arg_specs import chunk_specs, decode_limits, state_specs
from pallas_kernels import aot
from tests.aot.test_aot import config_and_params

pytestmark = pytest.mark.gpu


def step_of(slots: int, layers: int) -> list[aot.Thunk]:
    """Returns what one turn of the loop over steps launches, with its condition."""
    config, params = config_and_params("30B-A3B", layers)
    state = state_specs(config, slots, num_pages=1024)
    thunks = aot.thunks("h100", decode_loop, config, params, state, *decode_limits(config, slots))
    assert [each.kind for each in thunks if each.decided_by_host and not each.within] == ["kWhile"]
    return [each._replace(within=each.within[1:]) for each in thunks if each.within[:1] == ("kWhile",)]


def count_launches(thunks: list[aot.Thunk]) -> int:
    return sum(each.launches and "kConditional" not in each.within for each in thunks)


@pytest.mark.parametrize(("slots", "of_two_layers"), [(1, 38), (8, 38), (64, 40)])
def test_a_decoding_step_is_one_graph(slots: int, of_two_layers: int):
    two, four = (step_of(slots, layers) for layers in (2, 4))
    for thunks in (two, four):
        assert [each for each in thunks if each.decided_by_host] == []
        assert sum(each.kind == "kCommandBuffer" for each in thunks) == 1
    assert count_launches(four) - count_launches(two) <= of_two_layers


def test_a_chunk_has_no_loop_that_the_host_drives():
    config, params = config_and_params("30B-A3B", 2)
    state = state_specs(config, slots=32, num_pages=1024)
    thunks = aot.thunks("h100", prefill_chunk, config, params, state, chunk_specs(config, state, 512))
    assert [each.kind for each in thunks if each.decided_by_host] == []

"""Run by tests/test_kernels.py with two devices: kernels inside shard_map, tokens, experts or their widths divided."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.deepstack_add import arg_specs as add_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import arg_specs, fused_moe


def main() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    for tokens in (4, 64):
        for backend in (None, "xla", "cpu", "xla_grouped"):
            args = arg_specs.ArgSpec(tokens, 36, 10, 3, 20, "a third nowhere").arrays("float32")
            whole = fused_moe(*args, backend=backend)

            def call(*args: jax.Array, backend: str | None = backend) -> jax.Array:
                return fused_moe(*args, backend=backend)

            by_tokens = jax.shard_map(call, mesh=mesh, in_specs=(P("x"), P(), P(), P("x"), P("x")), out_specs=P("x"))
            np.testing.assert_allclose(jax.jit(by_tokens)(*args), whole, atol=1e-6)

            # the width F divided: each device has its columns of gate and of up, side by side
            hidden, gate_up, down, index, weights = args
            halves = jnp.stack(jnp.split(gate_up, 2, axis=-1), axis=2)  # [E, D, 2, F]

            def partial_sums(hidden, halves, down, index, weights, call=call):
                gate_up = halves.reshape(*halves.shape[:2], -1)
                return jax.lax.psum(call(hidden, gate_up, down, index, weights), "x")

            specs = P(), P(None, None, None, "x"), P(None, "x"), P(), P()
            by_width = jax.shard_map(partial_sums, mesh=mesh, in_specs=specs, out_specs=P())
            np.testing.assert_allclose(jax.jit(by_width)(hidden, halves, down, index, weights), whole, atol=1e-5)

            # the experts divided: what belongs to the other device goes nowhere
            def own_experts(hidden, gate_up, down, index, weights, call=call):
                first = jax.lax.axis_index("x") * len(gate_up)
                own = (index >= first) & (index < first + len(gate_up))
                return jax.lax.psum(call(hidden, gate_up, down, jnp.where(own, index - first, -1), weights), "x")

            by_expert = jax.shard_map(own_experts, mesh=mesh, in_specs=(P(), P("x"), P("x"), P(), P()), out_specs=P())
            np.testing.assert_allclose(jax.jit(by_expert)(*args), whole, atol=1e-6)

    hidden, rows, index = add_specs.TILED.arrays("float32", "float32")
    hidden, index = hidden[:36], index[:36]
    add = jax.shard_map(
        lambda hidden, rows, index: deepstack_add(hidden, rows, index, 1),
        mesh=mesh,
        in_specs=(P("x"), P(), P("x")),
        out_specs=P("x"),
    )
    placed = jax.device_put(hidden, NamedSharding(mesh, P("x")))
    np.testing.assert_array_equal(jax.jit(add)(placed, rows, index), deepstack_add(hidden, rows, index, 1))


if __name__ == "__main__":
    main()

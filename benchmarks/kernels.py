"""fused_moe and deepstack_add: every backend and its alternatives against what this machine can do.

    python benchmarks/kernels.py [--model 600M 30B-A3B 235B-A22B] [--tokens 1 8 512] [--dtype bfloat16] [--rounds 5]

For each shape: the time of every backend that runs here (the automatic choice is marked *; xla_grouped is XLA's
ragged_dot), of XLA's dense einsum, of tokamax where it is installed, and of PyTorch's experts (transformers' loop and
grouped_mm) where it is; the bound, which is the larger of bytes over the bandwidth and operations over the product
rate, both measured in this run; and the bound's share of each time. Bytes count each active expert's weights once, and
the hidden states in and out. `error` is the root mean square difference from the plain form, relative to its result:
what is wrong is not worth timing.

Calls are chained in one program, long enough to hide its start, and the routing depends on the call before, so that
nothing of it is computed once for all. Times are medians of rounds in which all alternatives take turns.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants its share of a GPU

import jax
import jax.numpy as jnp
from measured import bandwidth, best_rate, chip_name

from pallas_kernels import deepstack_add as add_module
from pallas_kernels import fused_moe as moe_module
from pallas_kernels.deepstack_add import arg_specs as add_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.fused_moe import arg_specs, fused_moe, xla
from pallas_kernels.fused_moe.arg_specs import ArgSpec

MODELS = {
    "600M": ArgSpec(1, width=1024, experts=32, top_k=4, inner=384),  # the model of benchmarks/decode.py
    "30B-A3B": arg_specs.QWEN3_VL_30B_A3B,
    "235B-A22B": arg_specs.QWEN3_VL_235B_A22B,
}
CHAIN_SECONDS = 0.05
LONGEST = 20.0  # seconds of one call, above which an alternative is left out of the rounds
DENSE_BYTES = 4 << 30  # of activations, above which the dense einsum is left out
Timed = Callable[[int], float]  # seconds of so many calls, one after another


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", nargs="+", choices=MODELS, default=["600M"])
    arguments.add_argument("--tokens", nargs="+", type=int, default=list(arg_specs.TOKENS))
    arguments.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    print(f"{chip_name()}; {versions()}; {time.strftime('%Y-%m-%d')}")
    for dtype in options.dtype:
        speed = bandwidth(), best_rate(dtype)
        print(f"{dtype}: {speed[0] / 1e9:.0f} GB/s read, {speed[1] / 1e9:.0f} GFLOP/s product")
        for model in options.model:
            for tokens in options.tokens:
                measure_moe(replace(MODELS[model], tokens=tokens), dtype, *speed, options.rounds)
        for spec in add_specs.REAL:
            measure_add(spec, dtype, speed[0], options.rounds)


def versions() -> str:
    found = []
    for package in ("jax", "tokamax", "torch", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def measure_moe(spec: ArgSpec, dtype: str, bytes_per_second: float, flops_per_second: float, rounds: int) -> None:
    args = spec.arrays(dtype)
    active = len(set(args[3].reshape(-1).tolist()))
    flops = 6 * spec.tokens * spec.top_k * spec.width * spec.inner
    itemsize = jnp.dtype(dtype).itemsize
    moved = active * 3 * spec.width * spec.inner * itemsize + 2 * 4 * spec.tokens * spec.width
    bound = max(moved / bytes_per_second, flops / flops_per_second)
    print(f"\n{spec} {dtype}: {active} active experts, {moved / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP")
    alternatives = {name: chained(partial(fused_moe, backend=name), args) for name in moe_module.BACKENDS}
    if 4 * spec.tokens * spec.experts * 2 * spec.inner <= DENSE_BYTES:
        alternatives["dense einsum"] = chained(dense, args)
    alternatives["tokamax"] = tokamax_of(args)
    alternatives |= torch_of(spec, args)
    automatic = moe_module._automatic(*args)[0]
    exact = jax.jit(xla.fused_moe)(*args)
    report(alternatives, automatic, bound, rounds, exact)


def measure_add(spec: add_specs.ArgSpec, dtype: str, bytes_per_second: float, rounds: int) -> None:
    args = spec.arrays(jnp.float32, dtype)
    itemsize = jnp.dtype(dtype).itemsize
    moved = spec.visual * spec.width * (2 * 4 + itemsize)
    print(f"\ndeepstack_add {spec} {dtype}: {moved / 1e6:.1f} MB of visual tokens")
    run = {name: partial(deepstack_add, level=1, backend=name) for name in add_module.BACKENDS}
    # alone, and after the residual that it follows in the model: there XLA adds both in one pass
    alternatives = {name: chained(call, args) for name, call in run.items()}
    alternatives |= {f"residual, {name}": chained(partial(with_residual, call), args) for name, call in run.items()}
    alternatives["residual alone"] = chained(lambda hidden, *_: 0.999 * hidden + 1e-3, args)
    report(alternatives, "xla", moved / bytes_per_second, rounds, None)


def with_residual(add: Callable[..., jax.Array], hidden: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    return add(0.999 * hidden + 1e-3, rows, index)


def report(alternatives: dict[str, Any], automatic: str, bound: float, rounds: int, exact: jax.Array | None) -> None:
    calls, times, errors = {}, {}, {}
    for name, (run, result) in alternatives.items():
        try:
            errors[name] = None if exact is None else relative_error(result(), exact)
            seconds = run(1)
            calls[name] = max(1, int(CHAIN_SECONDS / max(min(run(1), seconds), 1e-6)))
            if calls[name] > 1:
                run(calls[name])  # compiles
            times[name] = [] if seconds <= LONGEST else [seconds]
        except NotImplementedError as refused:
            print(f"  {name:22} refuses: {refused}")
        except Exception as error:  # an alternative that doesn't run here is part of the report
            print(f"  {name:22} doesn't run: {type(error).__name__}: {str(error).splitlines()[0][:110]}")
    for _ in range(rounds):
        for name, found in times.items():
            if not found or found[0] <= LONGEST:
                found.append(alternatives[name][0](calls[name]) / calls[name])
    for name, found in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        seconds = statistics.median(found)
        wrong = "" if errors[name] is None else f"  error {errors[name]:.1e}"
        mark = "*" if name == automatic else " "
        print(f" {mark}{name:22} {seconds * 1e3:10.3f} ms  {bound / seconds:6.1%} of the bound{wrong}", flush=True)


def relative_error(out: jax.Array, exact: jax.Array) -> float:
    difference = out.astype(jnp.float32) - exact
    return float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(exact.astype(jnp.float32) ** 2)))


def chained(call: Callable[..., jax.Array], args: tuple[jax.Array, ...]) -> tuple[Timed, Callable[[], jax.Array]]:
    """(seconds of n calls in one program, result of one)."""

    @partial(jax.jit, static_argnums=0)
    def run(count: int, hidden: jax.Array, *rest: jax.Array) -> jax.Array:
        def step(_: Any, hidden: jax.Array) -> jax.Array:
            same = (hidden[0, 0] > 1e30).astype(jnp.int32)  # 0, which XLA can't know
            varied = (x + same if x.dtype == jnp.int32 else x for x in rest)
            return call(hidden, *varied).astype(hidden.dtype)

        return jax.lax.fori_loop(0, count, step, hidden)

    def timed(count: int) -> float:
        jax.block_until_ready(run(count, *args)) if count not in compiled else None
        compiled.add(count)
        started = time.perf_counter()
        jax.block_until_ready(run(count, *args))
        return time.perf_counter() - started

    compiled: set[int] = set()
    return timed, lambda: jax.jit(call)(*args)


def dense(hidden: jax.Array, gate_up: jax.Array, down: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
    """Every token through every expert."""
    tokens, experts = len(hidden), len(gate_up)
    share = jnp.zeros((tokens, experts)).at[jnp.arange(tokens)[:, None], index].add(weights)
    x = hidden.astype(gate_up.dtype)
    inner = xla.swiglu(jnp.einsum("td,edf->tef", x, gate_up, preferred_element_type=jnp.float32))
    inner = (inner * share[..., None]).astype(down.dtype)
    return jnp.einsum("tef,efd->td", inner, down, preferred_element_type=jnp.float32)


def tokamax_of(args: tuple[jax.Array, ...]) -> tuple[Timed, Callable[[], jax.Array]]:
    def call(hidden: jax.Array, gate_up: jax.Array, down: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
        try:
            import tokamax
        except ImportError as missing:
            raise NotImplementedError("tokamax isn't installed") from missing
        order = jnp.argsort(index.reshape(-1))
        sizes = jnp.bincount(index.reshape(-1), length=len(gate_up)).astype(jnp.int32)
        rows = hidden.astype(gate_up.dtype)[order // index.shape[1]]
        inner = xla.swiglu(tokamax.ragged_dot(rows, gate_up, sizes, preferred_element_type=jnp.float32))
        out = tokamax.ragged_dot(inner.astype(down.dtype), down, sizes, preferred_element_type=jnp.float32)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
        return jnp.sum(out[place].reshape(*index.shape, -1) * weights[..., None], axis=1)

    return chained(call, args)


def torch_of(spec: ArgSpec, args: tuple[jax.Array, ...]) -> dict[str, tuple[Timed, Callable[[], jax.Array]]]:
    """transformers' experts, with its loop and with PyTorch's grouped product, on the same arrays."""
    try:
        import torch
        from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts
    except ImportError:
        return {}
    hidden, gate_up, down, index, weights = (torch.from_dlpack(x) for x in args)
    config = Qwen3VLMoeTextConfig(
        hidden_size=spec.width,
        num_experts=spec.experts,
        num_experts_per_tok=spec.top_k,
        moe_intermediate_size=spec.inner,
    )
    with torch.device("meta"):
        experts = Qwen3VLMoeTextExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(gate_up.transpose(1, 2).contiguous(), requires_grad=False)
    experts.down_proj = torch.nn.Parameter(down.transpose(1, 2).contiguous(), requires_grad=False)
    hidden, index, weights = hidden.to(gate_up.dtype), index.long(), weights.to(gate_up.dtype)

    def alternative(implementation: str) -> tuple[Timed, Callable[[], jax.Array]]:
        def call() -> Any:
            config._experts_implementation = implementation
            with torch.no_grad():
                return experts(hidden, index, weights)

        def timed(count: int) -> float:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(count):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - started

        return timed, lambda: jnp.asarray(call().float().cpu().numpy())

    return {"HF loop": alternative("eager"), "torch grouped_mm": alternative("grouped_mm")}


if __name__ == "__main__":
    main()

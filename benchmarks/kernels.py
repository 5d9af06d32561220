"""The kernels: every backend and its alternatives against what this machine can do.

    python benchmarks/kernels.py [--model 600M 30B-A3B 235B-A22B] [--tokens 1 8 512] [--dtype bfloat16] [--rounds 5]
                                 [--op fused_moe deepstack_add attention]

For each shape: the time of every backend that runs here (the automatic choice is marked *; xla_grouped is XLA's
ragged_dot), of XLA's dense einsum, of tokamax where it is installed, of PyTorch (transformers' experts by a loop and by
grouped_mm, scaled_dot_product_attention) where it is, and of cuDNN's attention on a GPU; the bound, which is the larger
of bytes over the bandwidth and operations over the product rate, both measured in this run; and the bound's share of
each time. Bytes count what has to be read and written once: of the weights those of active experts, of the keys those
that a query reads. `error` is the root mean square difference from the plain form, relative to its result: what is
wrong is not worth timing.

Calls are chained in one program, long enough to hide its start, and the routing depends on the call before, so that
nothing of it is computed once for all. Times are medians of rounds in which all alternatives take turns.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants its share of a GPU

import jax
import jax.numpy as jnp
from measured import bandwidth, best_rate, chip_name

from pallas_kernels import attention as attention_module
from pallas_kernels import deepstack_add as add_module
from pallas_kernels import fused_moe as moe_module
from pallas_kernels.attention import paged_attention, ranged_attention
from pallas_kernels.attention.arg_specs import HEADS, PagedArgSpec, RangedArgSpec
from pallas_kernels.deepstack_add import arg_specs as add_specs
from pallas_kernels.deepstack_add import deepstack_add
from pallas_kernels.dispatch import target_chip
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
OPS = "fused_moe", "deepstack_add", "attention"
Timed = Callable[[int], float]  # seconds of so many calls, one after another


@dataclass(frozen=True)
class Timing:
    """One alternative: the median seconds of a call, the bound's share of them, and the error; or why it has none."""

    name: str
    seconds: float = 0.0
    share: float = 0.0
    error: float | None = None
    refused: str = ""
    automatic: bool = False


@dataclass(frozen=True)
class Measured:
    """One shape: what the bound is, and the alternatives, the fastest first."""

    title: str
    bound: float
    timings: list[Timing]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", nargs="+", choices=MODELS, default=["600M"])
    arguments.add_argument("--tokens", nargs="+", type=int, default=list(arg_specs.TOKENS))
    arguments.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    options = arguments.parse_args()
    print(f"{chip_name()}; {versions()}; {time.strftime('%Y-%m-%d')}")
    for dtype in options.dtype:
        speed = bandwidth(), best_rate(dtype)
        print(f"{dtype}: {speed[0] / 1e9:.0f} GB/s read, {speed[1] / 1e9:.0f} GFLOP/s product")
        for model in options.model if "fused_moe" in options.op else ():
            for tokens in options.tokens:
                show(measure_moe(replace(MODELS[model], tokens=tokens), dtype, *speed, options.rounds))
        for spec in add_specs.REAL if "deepstack_add" in options.op else ():
            show(measure_add(spec, dtype, speed[0], options.rounds))
        for model in options.model if "attention" in options.op else ():
            for spec in attention_specs(model):
                show(measure_attention(spec, dtype, *speed, options.rounds))


def versions() -> str:
    found = []
    for package in ("jax", "tokamax", "torch", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def measure_moe(spec: ArgSpec, dtype: str, bytes_per_second: float, flops_per_second: float, rounds: int) -> Measured:
    args = spec.arrays(dtype)
    active = len(set(args[3].reshape(-1).tolist()))
    flops = 6 * spec.tokens * spec.top_k * spec.width * spec.inner
    itemsize = jnp.dtype(dtype).itemsize
    moved = active * 3 * spec.width * spec.inner * itemsize + 2 * 4 * spec.tokens * spec.width
    bound = max(moved / bytes_per_second, flops / flops_per_second)
    title = f"fused_moe {spec} {dtype}: {active} active experts, {moved / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP"
    alternatives = {name: chained(partial(fused_moe, backend=name), args) for name in moe_module.BACKENDS}
    if 4 * spec.tokens * spec.experts * 2 * spec.inner <= DENSE_BYTES:
        alternatives["dense einsum"] = chained(dense, args)
    alternatives["tokamax"] = tokamax_of(args)
    alternatives |= torch_of(spec, args)
    automatic = moe_module._automatic(*args)[0]
    exact = jax.jit(xla.fused_moe)(*args)
    return measured(title, alternatives, automatic, bound, rounds, exact)


def measure_add(spec: add_specs.ArgSpec, dtype: str, bytes_per_second: float, rounds: int) -> Measured:
    args = spec.arrays(jnp.float32, dtype)
    itemsize = jnp.dtype(dtype).itemsize
    moved = spec.visual * spec.width * (2 * 4 + itemsize)
    title = f"deepstack_add {spec} {dtype}: {moved / 1e6:.1f} MB of visual tokens"
    run = {name: partial(deepstack_add, level=1, backend=name) for name in add_module.BACKENDS}
    # alone, and after the residual that it follows in the model: there XLA adds both in one pass
    alternatives = {name: chained(call, args) for name, call in run.items()}
    alternatives |= {f"residual, {name}": chained(partial(with_residual, call), args) for name, call in run.items()}
    alternatives["residual alone"] = chained(lambda hidden, *_: 0.999 * hidden + 1e-3, args)
    return measured(title, alternatives, "xla", moved / bytes_per_second, rounds, None)


def with_residual(add: Callable[..., jax.Array], hidden: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    return add(0.999 * hidden + 1e-3, rows, index)


def attention_specs(model: str) -> list[PagedArgSpec | RangedArgSpec]:
    """Prefill of a prompt and of a chunk behind a long prefix, decode of one and of many rows, and the encoder."""
    if model not in HEADS:
        return [PagedArgSpec(1, 16, 4, 512, 512, 64), PagedArgSpec(8, 16, 4, 1, 1000, 64)]
    of_model = partial(PagedArgSpec, heads=HEADS[model], kv_heads=4, head_dim=128)
    return [
        of_model(1, length=4096, context=4096),
        of_model(1, length=1024, context=32768),
        of_model(1, length=1, context=4096),
        of_model(8, length=1, context=4096),
        of_model(32, length=1, context=8192),
        RangedArgSpec(1, 16, 16, 4096, 4096, 72, 1),  # an image of 1024 x 1024 pixels
    ]


def measure_attention(
    spec: PagedArgSpec | RangedArgSpec, dtype: str, bytes_per_second: float, flops_per_second: float, rounds: int
) -> Measured:
    args = spec.arrays(dtype)
    *_, start, stop = args
    keys = int(jnp.sum(stop - start))
    flops = 4 * spec.heads * spec.head_dim * keys
    itemsize = jnp.dtype(dtype).itemsize
    read = int(jnp.sum(jnp.max(stop, axis=1) - jnp.min(start, axis=1)))  # keys of each row, once
    queries = spec.batch * spec.heads * spec.length * spec.head_dim
    moved = 2 * read * spec.kv_heads * spec.head_dim * itemsize + queries * (itemsize + 4)
    bound = max(moved / bytes_per_second, flops / flops_per_second)
    op = paged_attention if isinstance(spec, PagedArgSpec) else ranged_attention
    title = f"{op.__name__} {spec} {dtype}: {moved / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP"

    def like_queries(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda query, *rest: call(query, *rest).swapaxes(1, 2)

    alternatives = {name: chained(like_queries(partial(op, backend=name)), args) for name in attention_module.BACKENDS}
    if isinstance(spec, RangedArgSpec):
        alternatives |= peers_of_attention(*args)
    else:  # over keys in order, as none of them takes these pages
        key, value = (in_order(pages, args[3]) for pages in args[1:3])
        alternatives |= peers_of_attention(args[0], key, value, start, stop)
    exact = jax.jit(like_queries(partial(op, backend="xla")))(*args)
    automatic = attention_module._automatic(op.__name__, target_chip(*args), *args)[0]
    return measured(title, alternatives, automatic, bound, rounds, exact)


def in_order(pages: jax.Array, page_table: jax.Array) -> jax.Array:
    """[B, K, P * page, h]."""
    rows = jnp.moveaxis(pages[page_table], 1, 2)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def peers_of_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, stop: jax.Array
) -> dict[str, tuple[Timed, Callable[[], jax.Array]]]:
    """cuDNN, tokamax and PyTorch, causal, over all keys, or one query over a row's first keys; heads first, as ours."""
    length, keys = query.shape[2], int(jnp.max(stop))
    key, value = key[:, :, :keys], value[:, :, :keys]
    decode, causal = length == 1, bool(jnp.any(stop != length)) and length > 1
    refused = "no causal mask behind a prefix" if causal and keys != length else ""

    def run(attend: Callable[..., jax.Array], implementation: str, *args: jax.Array) -> jax.Array:
        if refused:
            raise NotImplementedError(refused)
        *arrays, lengths = args
        options = {"key_value_seq_lengths": lengths} if decode else {"is_causal": causal}
        swapped = (x.swapaxes(1, 2) for x in arrays)
        return attend(*swapped, **options, implementation=implementation).swapaxes(1, 2)

    def cudnn(*args: jax.Array) -> jax.Array:
        if jax.default_backend() != "gpu":
            raise NotImplementedError("cuDNN needs an NVIDIA GPU")
        return run(jax.nn.dot_product_attention, "cudnn", *args)

    def tokamax(*args: jax.Array) -> jax.Array:
        try:
            from tokamax import dot_product_attention  # pyright: ignore[reportMissingImports]
        except ImportError as missing:
            raise NotImplementedError("tokamax isn't installed") from missing
        return run(dot_product_attention, "mosaic", *args)  # without a name, it silently takes XLA's form

    args = query, key, value, stop[:, 0]
    found = {name: chained(call, args) for name, call in (("cuDNN", cudnn), ("tokamax", tokamax))}
    if decode or refused:
        return found
    try:
        import torch
    except ImportError:
        return found
    q, k, v = (torch.from_dlpack(x) for x in (query, key, value))

    def sdpa() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return found | {"torch sdpa": torch_alternative(sdpa)}


def measured(
    title: str, alternatives: dict[str, Any], automatic: str, bound: float, rounds: int, exact: jax.Array | None
) -> Measured:
    """Times what runs and is right, in turns."""
    calls, times, errors, refused = {}, {}, {}, []
    for name, (run, result) in alternatives.items():
        try:
            errors[name] = None if exact is None else relative_error(result(), exact)
            seconds = run(1)
            calls[name] = max(1, int(CHAIN_SECONDS / max(min(run(1), seconds), 1e-6)))
            if calls[name] > 1:
                run(calls[name])  # compiles
            times[name] = [] if seconds <= LONGEST else [seconds]
        except NotImplementedError as reason:
            refused.append(Timing(name, refused=f"refuses: {reason}"))
        except Exception as error:  # an alternative that doesn't run here is part of the report
            refused.append(
                Timing(name, refused=f"doesn't run: {type(error).__name__}: {str(error).splitlines()[0][:110]}")
            )
    for _ in range(rounds):
        for name, found in times.items():
            if not found or found[0] <= LONGEST:
                found.append(alternatives[name][0](calls[name]) / calls[name])
    medians = sorted(((statistics.median(found), name) for name, found in times.items()), key=lambda pair: pair[0])
    timings = [Timing(name, took, bound / took, errors[name], automatic=name == automatic) for took, name in medians]
    return Measured(title, bound, timings + refused)


def show(found: Measured) -> None:
    print(f"\n{found.title}")
    for each in found.timings:
        if each.refused:
            print(f"  {each.name:22} {each.refused}")
            continue
        wrong = "" if each.error is None else f"  error {each.error:.1e}"
        mark = "*" if each.automatic else " "
        print(f" {mark}{each.name:22} {each.seconds * 1e3:10.3f} ms  {each.share:6.1%} of the bound{wrong}", flush=True)


def relative_error(out: jax.Array, exact: jax.Array) -> float:
    difference = out.astype(jnp.float32) - exact
    return float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(exact.astype(jnp.float32) ** 2)))


def chained(call: Callable[..., jax.Array], args: tuple[jax.Array, ...]) -> tuple[Timed, Callable[[], jax.Array]]:
    """(seconds of n calls in one program, result of one)."""

    @partial(jax.jit, static_argnums=0)
    def run(count: int, hidden: jax.Array, *rest: jax.Array) -> jax.Array:
        def step(_: Any, hidden: jax.Array) -> jax.Array:
            same = (hidden[(0,) * hidden.ndim] > 1e30).astype(jnp.int32)  # 0, which XLA can't know
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
            import tokamax  # pyright: ignore[reportMissingImports]
        except ImportError as missing:
            raise NotImplementedError("tokamax isn't installed") from missing
        order = jnp.argsort(index.reshape(-1))
        sizes = jnp.bincount(index.reshape(-1), length=len(gate_up)).astype(jnp.int32)
        rows = hidden.astype(gate_up.dtype)[order // index.shape[1]]
        # without a name, it silently takes XLA's form
        product = partial(tokamax.ragged_dot, preferred_element_type=jnp.float32, implementation="mosaic")
        inner = xla.swiglu(product(rows, gate_up, sizes))
        out = product(inner.astype(down.dtype), down, sizes)
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

        return torch_alternative(call)

    return {"HF loop": alternative("eager"), "torch grouped_mm": alternative("grouped_mm")}


def torch_alternative(call: Callable[[], Any]) -> tuple[Timed, Callable[[], jax.Array]]:
    """(seconds of n calls of PyTorch, result of one)."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def timed(count: int) -> float:
        call()
        wait()
        started = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return time.perf_counter() - started

    return timed, lambda: jnp.asarray(call().float().cpu().numpy())


if __name__ == "__main__":
    main()

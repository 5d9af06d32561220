"""The options of a server's engine, with defaults for the machine that it runs on."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from deepstack_jax import sharding
from deepstack_jax.checkpoint import Model
from deepstack_jax.config import TextConfig
from deepstack_jax.engine.core import Engine
from deepstack_jax.engine.shape import EngineShape
from deepstack_jax.rounding import cdiv

CPU_SLOTS, CHIP_SLOTS = 4, 32
CPU_CHUNK, CHIP_CHUNK = 512, 1024  # larger ones gain little, and hold up running streams for longer
MESH_TOKENS = 4096  # of a prefill program over all pools: larger ones gain little, and hold up streams for longer
CPU_KV_BYTES = 1 << 30
FREE_SHARE = 0.8  # of a chip's memory that weights leave; programs' temporaries take the rest


@dataclass(frozen=True)
class EngineOptions:
    """The options of a server's engine; None takes the default for the machine.

    Attributes:
        slots: requests that run at once: rows of the decode program. On a mesh, a multiple of the size of `data`.
        chunk: tokens of a prefill chunk, a multiple of 128.
        kv_bytes: memory of each device for keys and values; by default 1 GiB on CPU, and on a chip most of what the
            weights leave.
        decode_steps: tokens of a row between two looks at the results.
        decode_widths: widths of more decode programs, below `slots`. Few rows then run faster on a CPU, but the bits
            of an answer depend on how many requests run.
        prefix_cache: whether the pages of whole chunks are kept for prompts with the same beginning.
        research: whether programs that only research takes are compiled at the start.
    """

    slots: int | None = None
    chunk: int | None = None
    kv_bytes: int | None = None
    decode_steps: int = 8
    prefix_cache: bool = True
    decode_widths: tuple[int, ...] = ()
    research: bool = False

    def shape(self, mesh: Mesh | None = None) -> EngineShape:
        """The sizes of the programs on a mesh, or on one device.

        Raises:
            ValueError: a size that is not possible.
        """
        sizes = sharding.sizes(mesh)
        default = cdiv(CPU_SLOTS if _on_cpu() else CHIP_SLOTS, sizes[0]) * sizes[0]
        slots = self.slots or max(self.decode_widths, default=default)
        widths = tuple(sorted({*self.decode_widths, slots})) if self.decode_widths else ()
        chunk = self.chunk or default_chunk(mesh)
        return EngineShape(slots, chunk, decode_steps=self.decode_steps, decode_widths=widths, mesh=sizes)

    def build(self, model: Model, max_context: int | None = None, max_waiting: int = 64) -> Engine:
        """The engine, its KV pages allocated. With several processes, the others must `follow` with the same engine.

        Args:
            max_context: tokens of prompt and answer of a request at most; None takes the model's positions.

        Raises:
            ValueError: a size that is not possible, or memory for less than one page.
        """
        shape = self.shape(model.mesh)
        limit = model.config.text.max_position_embeddings
        longest = limit if max_context is None else min(max_context, limit)
        kv_bytes = _default_kv_bytes(model.mesh) if self.kv_bytes is None else self.kv_bytes
        fitting = kv_bytes // page_bytes(model, shape.page)
        if fitting < 2:
            raise ValueError(
                f"kv_bytes {kv_bytes} hold {fitting} KV pages of {page_bytes(model, shape.page)} bytes: "
                f"pass {2 * page_bytes(model, shape.page)} or more"
            )
        most = 1 + shape.slots // shape.pools * cdiv(longest, shape.page)  # more can't be in use
        in_line = max_waiting + shape.slots  # a slot is free only from the next turn on
        kind = Engine
        if jax.process_count() > 1 and jax.process_index() == 0:
            from deepstack_jax.engine.followers import LeadingEngine as kind
        options = {"prefix_cache": self.prefix_cache, "research": self.research}
        return kind(model, shape, min(fitting, most), max_waiting=in_line, **options)


def default_chunk(mesh: Mesh | None = None) -> int:
    """Tokens of a prefill chunk by default: 512 on CPU, 1024 on a chip, and less with more than 4 pools."""
    return chunk_on(mesh, CPU_CHUNK if _on_cpu() else CHIP_CHUNK)


def chunk_on(mesh: Mesh | None, chunk: int) -> int:
    """The most tokens of a chunk, up to `chunk`, with which a program has at most `MESH_TOKENS` over all pools."""
    page = EngineShape.page
    return min(chunk, max(MESH_TOKENS // sharding.sizes(mesh)[0] // page * page, page))


def token_bytes(text: TextConfig, dtype: np.dtype, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Bytes that one token takes in the KV cache of each device that holds it: its keys and values in all layers."""
    heads = text.num_key_value_heads * sharding.kv_repeats(text.num_attention_heads, text.num_key_value_heads, mesh)
    if mesh is not None:
        heads //= sharding.ways(sharding.split(heads, "kv_heads", mesh), mesh)
    return 2 * text.num_hidden_layers * heads * text.head_dim * dtype.itemsize


def page_bytes(model: Model, page: int) -> int:
    """Bytes of one KV page on each device that holds it: keys and values of `page` tokens in all layers."""
    return page * token_bytes(model.config.text, model.dtype, model.mesh)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _default_kv_bytes(mesh: Mesh | None) -> int:
    if _on_cpu():
        return CPU_KV_BYTES
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    free = min(each.get("bytes_limit", 0) - each.get("bytes_in_use", 0) for each in stats)
    if free <= 0:
        raise ValueError("the device doesn't say how much memory is free: pass kv_bytes")
    return int(FREE_SHARE * free)

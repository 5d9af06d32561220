"""Reads the part of a configuration that determines how positions become angles, as transformers does."""

from dataclasses import dataclass, replace

from deepstack_jax.config_values import ConfigError, Values
from deepstack_jax.errors import short

# The keys that each rope type reads, besides those that every type reads.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
ROPE_TYPES = tuple(ROPE_KEYS)
MAX_POSITIONS = 1 << 30
_COMMON_ROPE_KEYS = ("rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `mrope_section` counts frequencies of (time, height, width); None means 1-D rope."""

    theta: float
    rope_type: str = "default"
    mrope_section: tuple[int, int, int] | None = None
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


def rope_config(values: Values, of_vl: bool, sections: bool) -> tuple[RopeConfig, int]:
    """Returns (rope, number of positions that it supports). Keys and their precedence are as in transformers.

    `of_vl` selects the defaults of the vision-language families; without `sections`, the rope is 1-D even then. Raises
    `ConfigError` for an unsupported key or value.
    """
    rope = _rope_values(values)
    theta = rope.number("rope_theta", values.number("rope_theta", 500000.0 if of_vl else 10000.0, above=1), above=1)
    # with an mrope_section, the default type was once called "mrope"
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"{rope.where} asks for rope type {short(rope_type)}: expected one of {', '.join(ROPE_TYPES)}"
        )
    refuse_unknown_rope_keys(rope, rope_type)
    for part in (rope, values):
        if (share := part.number("partial_rotary_factor", 1.0)) != 1:
            raise ConfigError(f"{part.where}.partial_rotary_factor {share} is not supported: expected 1, or remove it")
    section = rope.integers("mrope_section", (24, 20, 20), most=1 << 20)
    # Sections need not add up to head_dim / 2: as in transformers, height and width take theirs and time the rest.
    if len(section) != 3:
        raise ConfigError(
            f"{rope.where}: mrope_section {short(list(section))} must be three counts (time, height, width)"
        )
    if of_vl and not rope.flag("mrope_interleaved", True):
        raise ConfigError(f"{rope.where}.mrope_interleaved false is not supported: Qwen3-VL's sections are interleaved")
    positions = values.integer("max_position_embeddings", 128000 if of_vl else 32768, most=MAX_POSITIONS)
    # positions of text are equal in time, height and width, so 1-D rope gives the same angles
    found = RopeConfig(theta=theta, rope_type=rope_type, mrope_section=section if sections else None)
    return _scaled(found, rope, values, positions)


def refuse_unknown_rope_keys(rope: Values, rope_type: str) -> None:
    """Raises `ConfigError` for a key that `rope_type` does not read."""
    known = ROPE_KEYS[rope_type]
    for key, value in rope.raw.items():
        if value is not None and key not in _COMMON_ROPE_KEYS and key not in known:
            meant = "is not read by" if any(key in keys for keys in ROPE_KEYS.values()) else "is unknown to"
            remedy = f"correct the rope_type (one of {', '.join(ROPE_TYPES)}), or remove {key}"
            raise ConfigError(f"{rope.where}.{key} {short(value)} {meant} rope type {short(rope_type)}: {remedy}")


def _scaled(found: RopeConfig, rope: Values, values: Values, positions: int) -> tuple[RopeConfig, int]:
    """Returns `found` with its scaling, and the number of positions that it then supports: factor x original ones."""
    if found.rope_type == "default":
        return found, positions
    # as in transformers, a value outside the rope's object takes precedence
    trained = values.integer("original_max_position_embeddings", rope.integer("original_max_position_embeddings", None))
    factor = rope.number("factor", None, above=0)
    if factor is None:
        if found.rope_type != "yarn" or trained in (None, positions):
            raise ConfigError(f"{rope.where} of rope type {found.rope_type!r} has no factor: add one")
        factor = positions / trained
    trained = positions if trained is None else trained
    found = replace(found, factor=factor, original_max_position_embeddings=trained)
    if found.rope_type == "yarn":
        found = replace(
            found,
            attention_factor=rope.number("attention_factor", None, least=0),
            beta_fast=rope.number("beta_fast", 32.0, above=0),
            beta_slow=rope.number("beta_slow", 1.0, above=0),
            truncate=rope.flag("truncate", True),
            mscale=rope.number("mscale", 0.0, least=0),
            mscale_all_dim=rope.number("mscale_all_dim", 0.0, least=0),
        )
    if factor * trained > MAX_POSITIONS:
        raise ConfigError(
            f"{rope.where}: factor {factor:g} times {trained} positions is above {MAX_POSITIONS}: correct the factor"
        )
    return found, max(1, int(factor * trained))


def _rope_values(values: Values) -> Values:
    """Returns the object with the rope's keys. If both are given, rope_scaling, the older name, takes precedence.

    Raises `ConfigError` if that would lose a key of rope_parameters.
    """
    old, new = values.object("rope_scaling"), values.object("rope_parameters")
    if not old:
        return Values(new, f"{values.where}.rope_parameters")
    read = {**values.raw, **old}
    lost = [key for key in ("rope_theta", "mrope_section") if new.get(key) not in (None, read.get(key))]
    if lost:
        raise ConfigError(
            f"{values.where} has both rope_scaling and rope_parameters, and only the latter has {lost[0]} "
            f"{new[lost[0]]!r}: put all keys into rope_parameters and remove rope_scaling"
        )
    return Values(old, f"{values.where}.rope_scaling")

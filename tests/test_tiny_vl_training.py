"""Training of examples/tiny_vl: batches are what inference sees, the loss is the model's, runs can be resumed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer

import deepstack_jax as dsj
from deepstack_jax.config import ModelConfig
from deepstack_jax.models.parameters import init_params
from deepstack_jax.models.registry import parse_config
from deepstack_jax.processing.chat import render as render_prompt
from pallas_kernels.fused_moe import fused_moe

tiny_vl = pytest.importorskip("tiny_vl")
pytest.importorskip("optax")

from deepstack_jax.demo.rendering import render  # noqa: E402
from deepstack_jax.demo.samples import KINDS, draw, sample  # noqa: E402
from deepstack_jax.demo.scenes import COLORS, SIZES, Scene  # noqa: E402
from tiny_vl import runs, steps  # noqa: E402
from tiny_vl import train as training  # noqa: E402
from tiny_vl.batches import Batcher, TrainingBatch  # noqa: E402
from tiny_vl.checkpoint import (  # noqa: E402
    SPECIAL_TOKENS,
    model_config,
    tiny_vl_config,
    train_tokenizer,
    write_checkpoint,
    write_companions,
)
from tiny_vl.evaluate import Case, answers, batches_of, messages_of, wanted, without_levels  # noqa: E402
from tiny_vl.loss import balance_of, load_of, loss_of, tiled_moe  # noqa: E402
from tiny_vl.sight import CLASSES, seen_in, sight_loss  # noqa: E402
from tiny_vl.sight import KINDS as SEEN_KINDS  # noqa: E402

pytestmark = pytest.mark.slow

SEED = 123_456
compiled_loss = jax.jit(loss_of, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(runs.spoken_texts(range(2_000_000, 2_000_300)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Untrained weights in float32, their experts' load uneven."""
    directory = tmp_path_factory.mktemp("tiny_vl") / "checkpoint"
    params = {name: np.asarray(value) for name, value in init_params(model_config(), seed=3).items()}
    write_checkpoint(directory, params, tokenizer, "float32")
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> dsj.Model:
    return dsj.load(checkpoint)


@pytest.fixture(scope="module")
def batches(checkpoint: Path) -> dict[str, TrainingBatch]:
    batcher = Batcher(checkpoint, model_config())
    return {kind: batcher.batch(kind, SEED, views=8) for kind in KINDS}


def small_config() -> ModelConfig:
    """tiny_vl's with narrow layers, as few as DeepStack's levels need: they compile and run quickly."""
    raw = tiny_vl_config()
    raw["text_config"] |= {"num_hidden_layers": 3, "hidden_size": 32, "moe_intermediate_size": 16, "head_dim": 16}
    raw["vision_config"] |= {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    return parse_config(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_that_prepare_gives(model: dsj.Model, batches: dict[str, TrainingBatch], kind: str):
    batch = batches[kind]
    samples = [sample(SEED + i, kind) for i in range(len(batch.media_ids))]
    inputs = dsj.prepare(model, [messages_of(one, "?") for one in samples])
    pixels = inputs["pixel_values_videos" if kind == "clip" else "pixel_values"]
    used = [view[:count] for view, count in zip(batch.pixels, batch.geometry.segment_stop[:, 0], strict=True)]
    if kind == "clip":  # clips with fewer than four temporal patches leave views empty
        per_sample = inputs["video_grid_thw"][:, 0]
        used = [used[4 * i + j] for i, count in enumerate(per_sample) for j in range(count)]
    trained = (np.concatenate(used).astype(np.float32) / 255 - 0.5) / 0.5
    # the processor multiplies by 1/255 where training divides: two roundings of values up to 1
    np.testing.assert_allclose(trained, pixels, rtol=0, atol=2.5e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_cross_entropy_of_the_public_forward(
    model: dsj.Model, batches: dict[str, TrainingBatch], kind: str
):
    batch = batches[kind]
    loss, seen = compiled_loss(model.config, model.params, batch.arrays())
    log_likelihood: list[float] = []
    # every exchange asked alone, through prepare and forward
    for name, rows in batch.rows.items():
        repeats = len(rows.families) // len(batch.media_ids)
        for i in range(len(batch.media_ids)):
            one = sample(SEED + i, kind)
            for j in range(repeats):
                row = i * repeats + j
                if rows.families[row]:
                    log_likelihood += _answer_likelihood(model, batch, name, row, one)
    expected = -np.mean(log_likelihood)
    # float32 sums in another order
    assert float(seen["answers"]) == pytest.approx(expected, rel=2e-5)
    assert float(loss) == pytest.approx(expected + 0.01 * float(seen["balance"]), rel=2e-5)


def _answer_likelihood(model: dsj.Model, batch: TrainingBatch, group: str, row: int, one: Any) -> list[float]:
    """Log-probability of each token of a row's answer, the question asked through the public functions."""
    rows = batch.rows[group]
    targets = rows.targets[row][rows.targets[row] >= 0]
    prompt_length = int(rows.answer_at[row, 0]) + 1
    question = model.processor.tokenizer.decode(rows.input_ids[row, :prompt_length])
    inputs = dsj.prepare(model, [messages_of(one, question.split("<|im_end|>")[0])])
    ids = np.concatenate([inputs["input_ids"][0], targets[:-1]])[None]
    visuals = {name: value for name, value in inputs.items() if "pixel" in name or "grid" in name}
    logits = np.asarray(dsj.forward(model, input_ids=ids, **visuals))[0, -len(targets) :]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probability[np.arange(len(targets)), targets].tolist()


def test_hidden_samples_are_seen_through_deepstack_alone(model: dsj.Model, batches: dict[str, TrainingBatch]):
    arrays = batches["picture"].arrays()
    samples = len(batches["picture"].media_ids)
    blind = {name: value * 0 if "visual.merger.linear_fc2" in name else value for name, value in model.params.items()}

    def answers_of(params: dict[str, Any], chosen: np.ndarray, hidden_share: float) -> float:
        rows = {
            name: r | {"targets": np.where(np.repeat(chosen, len(r["targets"]) // samples)[:, None], r["targets"], -1)}
            for name, r in arrays["rows"].items()
        }
        return float(compiled_loss(model.config, params, arrays | {"rows": rows}, hidden_share)[1]["answers"])

    first = np.arange(samples) < samples // 2
    seeing, unseeing = (answers_of(params, first, 0.0) for params in (model.params, blind))
    assert answers_of(model.params, first, 0.5) == pytest.approx(unseeing, rel=1e-6)
    assert abs(seeing - unseeing) > 1e-3
    assert answers_of(model.params, ~first, 0.5) == pytest.approx(answers_of(model.params, ~first, 0.0), rel=1e-6)


def test_tiled_experts_are_the_models_experts_and_so_is_their_gradient():
    keys = jax.random.split(jax.random.key(0), 4)
    tokens, width, experts, inner, top_k = 75, 12, 5, 7, 3
    hidden = jax.random.normal(keys[0], (tokens, width))
    gate_up = jax.random.normal(keys[1], (experts, width, 2 * inner)) * width**-0.5
    down = jax.random.normal(keys[2], (experts, inner, width)) * inner**-0.5
    # one expert gets nothing, another a row of every token
    scores = jax.random.normal(keys[3], (tokens, experts)).at[:, 1].set(-1e9).at[:, 4].set(9.0)
    weights, index = jax.lax.top_k(jax.nn.softmax(scores), top_k)

    def total(run: Any) -> Any:
        def loss(hidden: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(run(hidden, gate_up, down, index, weights)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(hidden, gate_up, down, weights)

    ours, gradient = total(lambda *args: tiled_moe(*args, tile=8))
    reference, reference_gradient = total(lambda *args: fused_moe(*args, backend="xla"))
    assert float(ours) == pytest.approx(float(reference), rel=1e-5)
    for found, expected in zip(gradient, reference_gradient, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums of up to 75 terms


def test_balance_is_one_for_an_even_router_and_the_number_of_experts_over_k_for_a_stuck_one():
    stuck = jnp.zeros((16, 8)).at[:, :2].set(50.0)
    even = 50.0 * (jnp.eye(8)[jnp.arange(16) % 8] + jnp.eye(8)[(jnp.arange(16) + 1) % 8])
    # the last eight tokens are padding, and must not count
    for logits, expected in ((stuck, 4.0), (even, 1.0), (jnp.concatenate([even[:8], stuck[:8]]), 1.0)):
        captured = {"router_logits": nnx.Intermediate((logits,)),
                    "top_k_index": nnx.Intermediate((jax.lax.top_k(logits, 2)[1],))}  # fmt: skip
        load = load_of(captured, jnp.arange(16) < 8)
        assert float(balance_of(load)) == pytest.approx(expected, rel=1e-5)


def test_tokens_show_what_the_pixels_of_their_place_show():
    changed_seen, unchanged_seen = [], []
    for seed in range(60):
        scene = draw(seed, "picture").subject
        assert isinstance(scene, Scene)
        empty = render(replace(scene, things=(), number=None))
        change = np.abs(np.asarray(render(scene), np.int32) - np.asarray(empty, np.int32)).max(axis=2) > 25
        rows, columns = 6, 5
        of_token = Image.fromarray(change.astype(np.uint8) * 255).resize((columns, rows), Image.Resampling.BOX)
        share = np.asarray(of_token, np.float32) / 255
        is_seen = seen_in(scene, rows, columns)[:, 0].reshape(rows, columns) > 0
        unchanged_seen += is_seen[share == 0].tolist()
        changed_seen += is_seen[share > 0.3].tolist()
    # things count as their boxes: a disc leaves a fifth of its box empty, a 1 more of its own
    assert np.mean(unchanged_seen) < 0.02
    assert np.mean(changed_seen) > 0.97


def test_the_token_of_a_things_centre_shows_the_thing():
    for seed in range(60):
        scene = draw(seed, "picture").subject
        assert isinstance(scene, Scene)
        seen = seen_in(scene, 12, 12).reshape(12, 12, 5)
        for thing in scene.things:
            found = seen[int(12 * thing.y / scene.height), int(12 * thing.x / scene.width)]
            expected = (thing.shape, thing.color, thing.size)
            assert (SEEN_KINDS[found[0]], list(COLORS)[found[1]], SIZES[found[2]]) == expected
            assert found[3] == found[4] == -1
        if scene.number:
            digits = sorted(int(d) for d in seen[..., 3:].ravel() if 0 <= d < 10)
            assert digits == sorted(int(d) for d in scene.number.text)


def test_sight_loss_counts_what_is_known():
    logits = jnp.zeros((3, sum(CLASSES))).at[0, 2].set(50.0)
    seen = jnp.array([[2, 0, 1, -1, -1], [0, -1, -1, -1, -1], [7, -1, -1, 4, 10]])
    loss, right = sight_loss(logits, seen)
    # certain and right, then two of eight; one of eight; one of two; one of eleven twice
    expected = (0 + 2 * np.log(8)) / 3 + np.log(8) + np.log(2) + 2 * np.log(11)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(right) == 0.5


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, tokenizer: Tokenizer):
    config = small_config()
    write_companions(tmp_path / "companions", tokenizer, "float32")
    batcher = Batcher(tmp_path / "companions", config)
    batches = [batcher.batch("picture", 3_000_000 + 64 * i, views=4).arrays() for i in range(4)]

    def advance(state: steps.TrainState, which: list[dict[str, Any]]) -> steps.TrainState:
        for arrays in which:
            state, _ = steps.train_step(config, state, arrays, jnp.float32(1e-3))
        return state

    whole = advance(steps.initial_state(config), batches)
    run = runs.Run(tmp_path)
    runs.save(run, advance(steps.initial_state(config), batches[:2]), elapsed=1.5)
    restored, elapsed = runs.restore(run, config)
    resumed = advance(restored, batches[2:])
    assert elapsed == 1.5
    assert int(resumed.step) == 4
    for (path, one), (_, other) in zip(
        jax.tree.leaves_with_path(whole), jax.tree.leaves_with_path(resumed), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


def test_training_learns_its_samples(tmp_path: Path, tokenizer: Tokenizer):
    config = small_config()
    write_companions(tmp_path, tokenizer, "float32")
    arrays = Batcher(tmp_path, config).batch("picture", 3_000_000, views=4).arrays()
    state, losses = steps.initial_state(config), []
    for _ in range(40):
        state, seen = steps.train_step(config, state, arrays, jnp.float32(3e-3))
        losses.append(float(seen["answers"]))
    assert losses[-1] < 0.5 * losses[0]


def test_the_steps_of_a_run_have_their_shares_of_kinds_and_no_evaluation_seed():
    kinds = [training.kind_of(step) for step in range(2000)]
    for kind in KINDS:
        expected = training.EARLY * training.EARLY_SHARES[kind] + (2000 - training.EARLY) * training.SHARES[kind]
        assert kinds.count(kind) == pytest.approx(expected, abs=80)  # over four standard deviations
    assert runs.FIRST_SEED >= 1_000_000
    assert kinds == [training.kind_of(step) for step in range(2000)]


def test_learning_rate_rises_then_falls():
    assert steps.rate(0, 0.0) == pytest.approx(steps.PEAK / steps.WARM_UP)
    assert steps.rate(10**6, 0.0) == pytest.approx(steps.PEAK)
    assert steps.rate(10**6, 0.5) == pytest.approx(steps.PEAK * (1 + steps.FLOOR) / 2)
    assert steps.rate(10**6, 1.0) == pytest.approx(steps.PEAK * steps.FLOOR)


def test_the_tokenizer_takes_any_text_and_splits_digits(tokenizer: Tokenizer):
    text = "Größe 4821 — 你好 <|x|>\n\t naïve"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("It is 4821.").tokens[-5:] == ["4", "8", "2", "1", "."]
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert tokenizer.get_vocab_size() <= model_config().text.vocab_size


def test_the_chat_template_writes_the_conversation_format_of_qwen(model: dsj.Model):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Is it red?"},
    ]
    template = model.processor.chat_template
    assert template is not None
    bare = copy.copy(model.processor.tokenizer)
    bare.chat_template = None
    for upto in (2, 4):
        rendered = model.processor.tokenizer.apply_chat_template(
            messages[:upto], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert rendered == render_prompt(messages[:upto], bare, None)


def test_the_directory_is_small_and_says_what_it_is(checkpoint: Path, model: dsj.Model):
    text, vision = model.config.text, model.config.vision
    assert vision is not None
    assert (text.num_hidden_layers, text.num_experts, text.num_experts_per_tok) == (6, 8, 2)
    assert len(vision.deepstack_visual_indexes) == 3
    assert vision.depth >= 4
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert size - weights / 2 <= 16 * 10**6  # float32 here, bfloat16 where it ships


def test_a_second_export_replaces_the_first_and_nothing_else(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path):
    params = {name: np.asarray(value) for name, value in init_params(model_config(), seed=4).items()}
    write_checkpoint(tmp_path / "out", params, tokenizer)
    write_checkpoint(tmp_path / "out", params, tokenizer)
    loaded = dsj.load(tmp_path / "out")
    name = "language_model.model.layers.2.mlp.experts.down_proj"
    np.testing.assert_array_equal(loaded.params[name], params[name].astype(jnp.bfloat16))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "other", params, tokenizer)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_evaluation_asks_every_question_once_in_batches_of_one_kind():
    cases = [Case(one, e) for kind in KINDS for seed in range(20) if (one := sample(seed, kind)) for e in one.exchanges]
    seen: list[int] = []
    for batch, size in batches_of(cases):
        assert len({(case.sample.kind, case.is_long) for case in batch}) == 1
        seen += [id(case) for case in batch[:size]]
    assert sorted(seen) == sorted(id(case) for case in cases)
    assert (wanted("number"), wanted("pair_more"), wanted("clip_event"), wanted("left_of")) == (92, 95, 95, 97)


def test_a_level_that_is_off_adds_nothing(model: dsj.Model):
    one = sample(7, "picture")
    inputs = dsj.prepare(model, [messages_of(one, "What do you see?")])
    off = without_levels(model, range(3))
    # the same weights in a model that declares no levels
    assert model.config.vision is not None
    config = replace(model.config, vision=replace(model.config.vision, deepstack_visual_indexes=()))
    params = {name: value for name, value in model.params.items() if "deepstack" not in name}
    expected = dsj.forward(dsj.Model(config, params, model.path), **inputs)
    np.testing.assert_allclose(dsj.forward(off, **inputs), expected, rtol=0, atol=1e-5)
    assert np.abs(dsj.forward(model, **inputs) - expected).max() > 0.1


def test_answers_come_through_the_public_functions(model: dsj.Model):
    case = Case(sample(7, "picture"), sample(7, "picture").exchanges[0])
    found = answers(model, [case, case])
    assert found[0] == found[1]

"""`deepstack-jax demo`: a new picture, three questions, and what the bundled model answers.

Twice: the whole model in this process, and split in an encode process and a language process (`demo_split.py`).
"""

import contextlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepstack_jax.bundled import existing_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_IMAGE = Path(__file__).parent.parent / "data" / "coffee.jpg"
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "Do you see a number?")  # of one's own picture


@dataclass
class Question:
    """What is asked, and the right answer if it is known."""

    text: str
    truth: str | None = None


def run(
    image: Annotated[str | None, typer.Option(help="your own picture: file, URL or data URI")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="your own question; may be given several times")] = None,
    checkpoint: Annotated[Path, typer.Option(help="a checkpoint, if not the one that ships")] = Path("tiny-vl"),
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer at most")] = 32,
    seed: Annotated[int | None, typer.Option(help="draws the same picture again", min=0)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="start an encode and a language node, and open their page instead")
    ] = False,
    browser: Annotated[bool, typer.Option(help="with --page: open it; its URL is printed in any case")] = True,
) -> None:
    """Draws a picture, asks three questions about it, and shows the answers beside the truth and what took how long.

    The whole model answers, then an encode process and a language process, to the same tokens.

    Example: deepstack-jax demo --image holiday.jpg --prompt "What do you see?"
    """
    existing_checkpoint(checkpoint)
    # processes share an accelerator here: none may take all of its memory at the start
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if page:
        from deepstack_jax.cli.demo_page import show_page

        show_page(checkpoint, browser)
        return
    if seed is None:
        from deepstack_jax.demo.samples import UNSEEN_SEEDS

        seed = secrets.randbelow(UNSEEN_SEEDS)
    picture, questions = _drawn(seed) if image is None else (_loaded(image), [Question(text) for text in QUESTIONS])
    if prompt:
        questions = [Question(text) for text in prompt]
    shown: dict[str, Any] = {"image": image, "seed": None if image else seed}
    if not as_json:
        _show_picture(picture, f"{image}" if image else f"seed {seed}")
    shown |= _walk(checkpoint, picture, questions, max_new_tokens)
    if as_json:
        print(json.dumps(shown, ensure_ascii=False))
    else:
        _print(shown)
    if shown["tokens_split"] not in (None, shown["tokens_whole"]):
        raise ValueError(f"the split gave the tokens {shown['tokens_split']}, the whole model {shown['tokens_whole']}")


def _drawn(seed: int) -> tuple[Any, list[Question]]:
    """A picture of the kind that the model was trained on, and three questions of different families about it."""
    from deepstack_jax.demo.samples import sample

    drawn = sample(seed, "picture")
    by_family = {exchange.family: exchange for exchange in drawn.exchanges}
    description = by_family.pop("describe")
    chosen = [description, *list(by_family.values())[:2]]
    return drawn.images[0], [Question(exchange.question, exchange.answer) for exchange in chosen]


def _loaded(image: str) -> Any:
    from deepstack_jax.processing.images import load_image

    return load_image(image)


def _walk(checkpoint: Path, picture: Any, questions: list[Question], max_new_tokens: int) -> dict[str, Any]:
    """Asks every question of both ways, each twice, as the first run of a shape compiles: what was answered, and when.

    The second runs are the ones that are timed, one after another, when nothing else runs.
    """
    started = time.perf_counter()
    stages: list[dict[str, Any]] = []

    def lap(stage: str, result: str, seconds: float | None = None) -> None:
        nonlocal started
        now = time.perf_counter()
        stages.append({"stage": stage, "seconds": now - started if seconds is None else seconds, "result": result})
        started = now

    import jax

    import deepstack_jax as dsj
    from deepstack_jax.checkpoint import Model
    from deepstack_jax.cli.demo_split import SplitNodes, missing, spans_of

    lap("start", f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    lacking = "a TPU takes one process" if jax.default_backend() == "tpu" else missing()

    def whole(model: Model, arrays: dict[str, Any]) -> dsj.GenerateOutput:
        return dsj.generate(model, **arrays, max_new_tokens=max_new_tokens)

    split: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        nodes = None if lacking else stack.enter_context(SplitNodes(checkpoint))
        model = dsj.load(checkpoint, "float32")
        parameters = sum(array.size for array in model.params.values())
        text = model.config.text
        experts = f"{text.num_experts} experts, {text.num_experts_per_tok} a token"
        lap("load", f"{parameters:,} parameters: {text.num_hidden_layers} layers of {text.hidden_size}, {experts}")
        for question in questions:
            whole(model, dsj.prepare(model, question.text, images=[picture]))
        lap("compile", "one program per shape; a server does this once")
        if nodes:
            nodes.wait()
            for question in questions:
                nodes.ask(question.text, picture, max_new_tokens)
            lap("split", "an encode process and a language process have started and compiled as well")

        inputs = [dsj.prepare(model, questions[0].text, images=[picture])]
        first_prepared = time.perf_counter() - started
        inputs += [dsj.prepare(model, question.text, images=[picture]) for question in questions[1:]]
        grid = inputs[0]["image_grid_thw"][0].tolist()
        visual = int((inputs[0]["mm_token_type_ids"] == 1).sum())
        tokens = [int(arrays["attention_mask"].sum()) for arrays in inputs]
        lap("prepare", f"{grid[1]} x {grid[2]} patches, {visual} visual tokens, prompts of {_listed(tokens)}")
        outs = [whole(model, arrays) for arrays in inputs]
        levels, made = model.config.num_deepstack_levels, sum(int(out.lengths[0]) for out in outs)
        rows = f"rows [{visual}, {(1 + levels) * text.hidden_size}]"
        for stage, result in (
            ("encode", f"{rows}: the embeddings and {levels} deepstack levels"),
            ("prefill", f"{sum(tokens)} tokens; level i is added after layer i for i < {levels}"),
            ("decode", f"{made} tokens, one loop on the device an answer"),
        ):
            lap(stage, result, sum(out.timings[stage] for out in outs))
        if nodes:
            split = [nodes.ask(question.text, picture, max_new_tokens) for question in questions]

    answers = [
        {
            "question": question.text,
            "answer": dsj.decode(model, out)[0],
            "truth": question.truth,
            "tokens": out.tokens[0, : out.lengths[0]].tolist(),
        }
        for question, out in zip(questions, outs, strict=True)
    ]
    meta = split[0]["meta_info"] if split else None
    return {
        "answers": answers,
        "stages": stages,
        "prompt_tokens": tokens,
        "visual_tokens": visual,
        "tokens_whole": [answer["tokens"] for answer in answers],
        "tokens_split": [answer["output_ids"] for answer in split] if meta else None,
        # of the first question
        "rounds": len(meta["split"]["rounds"]) if meta else 0,
        "bytes_on_wire": meta["split"]["bytes"] if meta else 0,
        "timings": {
            "whole": {"prepare": first_prepared, **outs[0].timings},
            "split": meta["timings"] | {"e2e": meta["e2e_latency"]} if meta else None,
        },
        "timeline": [span._asdict() for span in spans_of(meta)] if meta else [],
        "missing": lacking,
    }


def _show_picture(picture: Any, title: str) -> None:
    from rich.console import Console

    from deepstack_jax.cli.terminal_picture import draw

    console = Console()
    # a cell is twice as high as wide: at most 24 lines
    columns = min(console.width, 64, max(1, round(48 * picture.width / picture.height)))
    console.print(f"\n[bold]deepstack-jax[/bold]  {title}, {picture.width} x {picture.height} pixels\n")
    console.print(draw(picture, columns, color=console.color_system is not None))


def _print(shown: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    answers = Table(box=None, pad_edge=False)
    is_known = any(each["truth"] for each in shown["answers"])
    for column in ("question", "answer", *(("truth",) if is_known else ())):
        answers.add_column(column)
    for each in shown["answers"]:
        right = each["truth"] in (None, each["answer"])
        cells = [Text(each["question"]), Text(each["answer"], "" if not each["truth"] else "green" if right else "red")]
        answers.add_row(*cells, *([Text(each["truth"] or "")] if is_known else []))
    stages = Table(box=None, pad_edge=False)
    stages.add_column("stage", style="cyan")
    stages.add_column("time", justify="right")
    stages.add_column("what it made")
    for stage in shown["stages"]:
        stages.add_row(stage["stage"], f"{stage['seconds'] * 1e3:,.0f} ms", stage["result"])
    console.print()
    console.print(answers)
    console.print()
    console.print(stages)
    console.print()
    _print_split(console, shown)
    if shown["seed"] is not None:
        console.print(f"\nThe same picture again: deepstack-jax demo --seed {shown['seed']}", style="dim")
        console.print("Your own:               deepstack-jax demo --image photo.jpg", style="dim")
    else:
        console.print(
            "\nIt was trained only on drawn shapes and numbers, and knows nothing of photographs.", style="dim"
        )


def _print_split(console: "Console", shown: dict[str, Any]) -> None:
    from deepstack_jax.cli.timeline import Span, draw

    if shown["tokens_split"] is None:
        console.print(f"Not shown: the split in two processes. {shown['missing']}", style="yellow", markup=False)
        return
    console.print("[bold]Split[/bold]: one process encodes, another answers, Mooncake carries the rows\n")
    console.print(
        draw([Span(**span) for span in shown["timeline"]], min(console.width, 100), console.options.ascii_only)
    )
    same = shown["tokens_split"] == shown["tokens_whole"]
    count = sum(len(tokens) for tokens in shown["tokens_whole"])
    verdict = f"the same {count} tokens as the whole model" if same else "other tokens than the whole model"
    rounds = f"{shown['rounds']} round" + ("s" if shown["rounds"] > 1 else "")
    console.print(f"\n[{'green' if same else 'red'}]{verdict}[/]", end="")
    console.print(f"; {shown['visual_tokens']} rows, {rounds}, {shown['bytes_on_wire']:,} bytes")


def _listed(numbers: list[int]) -> str:
    return " and ".join(str(number) for number in sorted(set(numbers))) + " tokens"

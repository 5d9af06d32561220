"""`deepstack-jax generate`: an answer to a prompt with images and videos."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def run(
    checkpoint: Annotated[Path, typer.Argument(help="directory made by convert, or a Hugging Face directory")],
    prompt: Annotated[str, typer.Option(help="the question")],
    image: Annotated[list[str] | None, typer.Option(help="file, URL or data URI; may be given several times")] = None,
    video: Annotated[list[str] | None, typer.Option(help="file; may be given several times")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of the answer at most")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw among the k likeliest; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw among the likeliest that add up to p")] = 1.0,
    min_p: Annotated[float, typer.Option(help="leave out what is less likely than min_p times the likeliest")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 repeats less")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="above 0 repeats less")] = 0.0,
    seed: Annotated[int, typer.Option(help="the same seed draws the same answer")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="the checkpoint's by default")] = None,
    expert_layout: Annotated[Literal["hf4", "hf5"] | None, typer.Option(help="where shapes can't tell")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of streaming")] = False,
) -> None:
    """Answers a prompt and streams the text as it comes.

    Example: deepstack-jax generate ckpt --prompt "What is on the table?" --image coffee.jpg
    """
    import deepstack_jax as dsj
    from deepstack_jax.cli.progress import loading

    started = time.perf_counter()
    with loading(f"loading {checkpoint}") as progress:
        model = dsj.load(checkpoint, dtype, expert_layout=expert_layout, progress=progress)
    loaded = time.perf_counter()
    inputs = dsj.prepare(model, prompt, images=image or (), videos=video or ())
    prepared = time.perf_counter()
    timings = {"load": loaded - started, "prepare": prepared - loaded}
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "seed": seed,
    }
    prompt_tokens = int(inputs["attention_mask"].sum())
    if as_json:
        out = dsj.generate(model, **inputs, **options)
        answer = {
            "text": dsj.decode(model, out)[0],
            "token_ids": out.tokens[0, : out.lengths[0]].tolist(),
            "prompt_tokens": prompt_tokens,
            "timings": {stage: round(seconds, 6) for stage, seconds in (timings | out.timings).items()},
        }
        print(json.dumps(answer, ensure_ascii=False))
        return
    pieces = model.processor.decode_stream()
    made = 0
    for token in dsj.stream(model, inputs, **options):
        made += 1
        print(pieces.feed(int(token[0])), end="", flush=True)
    print(pieces.finish(), flush=True)
    seconds = time.perf_counter() - prepared
    print(f"{prompt_tokens} prompt tokens, {made} new ones in {seconds:.1f} s, compiling included", file=sys.stderr)

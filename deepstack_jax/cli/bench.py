"""`deepstack-jax bench`: measures a server, or a checkpoint on this machine."""

import asyncio
import json
import re
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deepstack_jax.bundled import existing_checkpoint
from deepstack_jax.cli.mesh import MeshShape, open_mesh
from deepstack_jax.cli.profile import ProfileDir, name_programs, traced

if TYPE_CHECKING:
    import httpx

    from deepstack_jax.bench.load import RequestRecord

HELP = "Measures a server, or a checkpoint on this machine."
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def _size(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise typer.BadParameter(f"{text} is not WIDTHxHEIGHT: give 448x448, for example")
    return int(found[1]), int(found[2])


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text} is not a JSON object")
    return found


def serve(
    url: Annotated[
        str, typer.Option(help="the server's; its /v1 or /v1/chat/completions may be included")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="the only one that the server lists by default")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="sent as a bearer token")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="requests at once: the next starts when one ends; 8 by default")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="instead: requests per second on average, at random times")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="how many are measured")] = 64,
    warm_up: Annotated[
        int | None, typer.Option(min=0, help="how many are sent before those; by default as many as run at once, or 8")
    ] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="length of each prompt's text, approximately")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="maximum length of each answer")] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="answers of exactly that length, on servers that have this field")
    ] = False,
    images: Annotated[int, typer.Option(min=0, help="pictures in each prompt")] = 0,
    image_size: Annotated[Any, typer.Option(parser=_size, metavar="WxH", help="of each in pixels")] = "448x448",
    same_image: Annotated[bool, typer.Option("--same-image", help="the same pictures in all prompts")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="instead of made-up prompts: a file with a JSON list of messages per line, used in turn"),
    ] = None,
    body: Annotated[
        Any, typer.Option(parser=_object, metavar="JSON", help="more fields of each request; null leaves a field out")
    ] = "{}",
    seed: Annotated[int, typer.Option(min=0, help="of prompts, pictures and times")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds from a request to the end of its answer")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Puts load on any server with OpenAI's POST /v1/chat/completions, and reports throughput and latency.

    Prints a table and histograms. The exit code is 1 if a request failed.

    Example: deepstack-jax bench serve --url http://127.0.0.1:8000 --concurrency 8 --images 1 --output-tokens 64
    """
    if concurrency is not None and rate is not None:
        raise typer.BadParameter("--concurrency and --rate exclude each other: give one of them")
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ValueError("bench serve needs httpx: pip install 'deepstack-jax[serve]'") from None
    from deepstack_jax.bench import load, report
    from deepstack_jax.bench.prompts import PromptShape, read_prompts
    from deepstack_jax.cli.progress import counting

    try:
        clients = load.Clients(url, api_key)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    given = read_prompts(prompts) if prompts else None
    shape = PromptShape(input_tokens, images, image_size, same_image, seed)
    arrivals = () if rate is None else load.poisson_arrivals(rate, requests, seed)
    warm_up = (concurrency or 8) if warm_up is None else warm_up
    concurrency = concurrency or (8 if rate is None else None)

    async def run() -> tuple[str, "list[RequestRecord]"]:
        async with aclosing(clients):
            async with clients.one() as client:
                name = model or await load.only_model(client)
                fitted = shape if given else await _fit(client, name, shape)

            def encoded(number: int) -> bytes:
                messages = given[number % len(given)] if given else fitted.messages(number)
                return load.encode_body(name, messages, output_tokens, ignore_eos, body)

            with counting("making prompts", requests + warm_up) as advance:
                # all of them before the first is sent; those that are measured don't depend on how many warm up
                bodies = []
                for number in range(requests + warm_up):
                    bodies.append(encoded(number))
                    advance()
            with counting("warming up", warm_up) as advance:
                warm = await load.run_load(
                    clients, bodies[requests:], concurrency=concurrency or warm_up, timeout=timeout, on_done=advance
                )
            if failed := next((record for record in warm if record.error), None):
                raise ValueError(f"{clients.base}/chat/completions: {load.explain(failed)}")
            with counting("measuring", requests) as advance:
                measured = bodies[:requests]
                options = {"concurrency": concurrency, "arrivals": arrivals, "timeout": timeout, "on_done": advance}
                return name, await load.run_load(clients, measured, **options)

    name, records = asyncio.run(run())
    found = report.summary(records)
    if as_json:
        settings = {"concurrency": concurrency, "rate": rate, "output_tokens": output_tokens, "seed": seed}
        made_up = {} if given else {"input_tokens": input_tokens, "images": images, "image_size": list(image_size)}
        print(json.dumps({"url": url, "model": name, "load": settings | made_up, **found}))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        pace = f"{concurrency} at once" if rate is None else f"{rate:g} requests/s offered"
        console.print(f"{name} on {url}, {pace}", markup=False)
        console.print(report.show(found, report.samples(records), console.width, console.options.ascii_only))
    if found["failed"]:
        raise ValueError(f"{found['failed']} of {requests} requests failed; {found['errors'][0]['message']}")


async def _fit(client: "httpx.AsyncClient", model: str, shape: Any) -> Any:
    """The shape with as many words as make its number of tokens, if the server can count tokens."""
    from dataclasses import replace

    import numpy as np

    from deepstack_jax.bench.load import count_tokens
    from deepstack_jax.bench.prompts import words_of

    sample = words_of(np.random.default_rng(shape.seed), 512)
    count = await count_tokens(client, model, sample)
    return shape if count is None else replace(shape, words=max(round(shape.words * 512 / count), 1))


def decode(
    checkpoint: Annotated[Path, typer.Argument(help="directory made by convert, or a Hugging Face directory")],
    batch: Annotated[int, typer.Option(min=1, help="prompts that run at once")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="length of each prompt")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="tokens decoded for each prompt")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="times that all this is measured")] = 5,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="the checkpoint's by default")] = None,
    mesh: MeshShape = None,
    profile: ProfileDir = None,
    as_json: AsJson = False,
) -> None:
    """Measures prefill and decode of a checkpoint on this machine, without a server, on random prompts.

    The figures are medians of all rounds, after a round that compiles.

    Example: deepstack-jax bench decode ckpt --batch 8 --prompt-tokens 512
    """
    path = existing_checkpoint(checkpoint)
    name_programs(profile)
    placed = open_mesh(mesh, None, None, None)
    import jax

    import deepstack_jax as dsj
    from deepstack_jax.bench.decode import measure
    from deepstack_jax.cli.progress import loading

    with loading(f"loading {checkpoint}") as progress:
        model = dsj.load(path, dtype, placed, progress=progress)
    found = measure(model, batch, prompt_tokens, steps, rounds, traced(profile))
    devices = f"{placed.size if placed else 1} x {jax.devices()[0].device_kind}"
    if as_json:
        what = {"checkpoint": str(checkpoint), "dtype": model.dtype.name, "devices": devices}
        load = {"batch": batch, "prompt_tokens": prompt_tokens, "steps": steps, "rounds": rounds}
        print(json.dumps(what | load | found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "tokens", "median s", "min s", "max s", "tokens/s", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, each in found.items():
        seconds = (f"{each[key]:.4f}" for key in ("seconds", "seconds_min", "seconds_max"))
        table.add_row(stage, f"{each['tokens']:,}", *seconds, f"{each['tokens_per_s']:,.1f}")
    console = Console(highlight=False)
    title = f"{checkpoint} in {model.dtype.name} on {devices}, jax {jax.__version__}, {rounds} rounds"
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)


COMMANDS = {"serve": serve, "decode": decode}

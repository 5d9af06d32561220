"""`deepstack-jax generate`: an answer to a prompt with images and videos."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import deepstack_jax as dsj
from deepstack_jax.bundled import existing_checkpoint
from deepstack_jax.cli.mesh import Coordinator, MeshShape, NumProcesses, ProcessId, open_mesh
from deepstack_jax.cli.profile import ProfileDir, name_programs, traced
from deepstack_jax.errors import naming

if TYPE_CHECKING:
    from deepstack_jax.checkpoint import Model


def run(
    checkpoint: Annotated[Path, typer.Argument(help="directory made by convert, or a Hugging Face directory")],
    prompt: Annotated[str | None, typer.Option(help="the question, or a whole prompt with chat markers")] = None,
    messages: Annotated[
        str | None, typer.Option(help="a conversation in place of --prompt: a JSON file, - for stdin, or JSON")
    ] = None,
    image: Annotated[list[str] | None, typer.Option(help="file, URL or data URI; may be given several times")] = None,
    video: Annotated[list[str] | None, typer.Option(help="the same; may be given several times")] = None,
    tools: Annotated[str | None, typer.Option(help="JSON schemas for the chat template, as --messages")] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="variables of the chat template: a JSON object, as --messages")
    ] = None,
    enable_thinking: Annotated[
        bool | None, typer.Option("--enable-thinking/--no-enable-thinking", help="for templates that read it")
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(help="of each image after resizing; the checkpoint's")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="of each image after resizing; the checkpoint's")] = None,
    fps: Annotated[float | None, typer.Option(help="frames sampled per second of video; the checkpoint's")] = None,
    num_frames: Annotated[int | None, typer.Option(help="frames sampled per video, in place of --fps")] = None,
    min_frames: Annotated[int | None, typer.Option(help="minimum number of frames sampled per video")] = None,
    max_frames: Annotated[int | None, typer.Option(help="maximum number of frames sampled per video")] = None,
    sample_frames: Annotated[
        bool | None, typer.Option("--sample-frames/--all-frames", help="sample videos, or take every frame")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="maximum length of the answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw among the k likeliest; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw among the likeliest that add up to p")] = 1.0,
    min_p: Annotated[float, typer.Option(help="leave out what is less likely than min_p times the likeliest")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 repeats less")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="above 0 repeats less")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="the same, for each time that a token occurred")] = 0.0,
    seed: Annotated[int, typer.Option(help="the same seed draws the same answer")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="text that ends the answer; may be given several times")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="the checkpoint's by default")] = None,
    expert_layout: Annotated[
        Literal["hf4", "hf5"] | None, typer.Option(help="only needed if shapes are ambiguous")
    ] = None,
    mesh: MeshShape = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    profile: ProfileDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of streaming")] = False,
) -> None:
    """Answers a prompt and streams the text as it comes.

    Example: deepstack-jax generate ckpt --prompt "What is on the table?" --image coffee.jpg
    """
    if (prompt is None) == (messages is None):
        raise typer.BadParameter("give either --prompt or --messages")
    question: Any = prompt if messages is None else _read_json(messages, "--messages", list)
    prompt_options: dict[str, Any] = {
        "tools": None if tools is None else _read_json(tools, "--tools", list),
        "chat_template_kwargs": _read_json(chat_template_kwargs or "{}", "--chat-template-kwargs", dict),
        "enable_thinking": enable_thinking,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "fps": fps,
        "num_frames": num_frames,
        "min_frames": min_frames,
        "max_frames": max_frames,
        "do_sample_frames": sample_frames,
    }
    checkpoint = existing_checkpoint(checkpoint)
    options = dsj.SamplingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    _refuse_missing([*(image or ()), *(video or ())])
    from deepstack_jax.cli.progress import loading
    from deepstack_jax.processes import is_first
    from deepstack_jax.processing.prompt_options import PromptOptions
    from deepstack_jax.processing.stop_strings import StopStrings

    PromptOptions.of(prompt_options)  # before the weights are read
    stops = StopStrings.of(stop)
    started = time.perf_counter()
    name_programs(profile)
    placed = open_mesh(mesh, coordinator, num_processes, process_id)
    speaks = is_first()  # of several processes, one prints the answer
    with loading(f"loading {checkpoint}") as progress:
        model = dsj.load(checkpoint, dtype, placed, expert_layout=expert_layout, progress=progress)
    loaded = time.perf_counter()
    inputs = dsj.prepare(model, question, images=image or (), videos=video or (), **prompt_options)
    prepared = time.perf_counter()
    prompt_tokens = int(inputs["attention_mask"].sum())
    timings = {"load": loaded - started, "prepare": prepared - loaded}
    if profile is not None:  # an answer that compiles comes first
        dsj.generate(model, **inputs, sampling=options)
    with traced(profile):
        begun = time.perf_counter()
        if as_json and not stop:
            out = dsj.generate(model, **inputs, sampling=options)
            tokens, text = out.tokens[0, : out.lengths[0]].tolist(), dsj.decode(model, out)[0]
            timings |= out.timings
        else:
            tokens, text = _stream(model, inputs, options, stops, shown=speaks and not as_json)
            timings["generate"] = time.perf_counter() - begun
    if not speaks:
        return
    if as_json:
        answer = {
            "text": text,
            "token_ids": tokens,
            "prompt_tokens": prompt_tokens,
            "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
        }
        print(json.dumps(answer, ensure_ascii=False))
        return
    seconds = timings["generate"]
    compiling = "without compiling" if profile else "compiling included"
    print(f"{prompt_tokens} prompt tokens, {len(tokens)} new ones in {seconds:.1f} s, {compiling}", file=sys.stderr)


def _stream(
    model: "Model", inputs: dict[str, Any], options: dsj.SamplingOptions, stops: Any, *, shown: bool
) -> tuple[list[int], str]:
    """The tokens and the text of an answer up to a stop string; printed as it comes if `shown`."""
    pieces = model.processor.decode_stream()
    tokens: list[int] = []
    text = ""

    def say(piece: str) -> None:
        nonlocal text
        text += piece
        if shown:
            print(piece, end="", flush=True)

    for token in dsj.stream(model, **inputs, sampling=options):
        tokens.append(int(token[0]))
        say(stops.feed(pieces.feed(tokens[-1])))
        if stops.matched is not None:
            break
    else:
        say(stops.feed(pieces.finish()) + stops.finish())
    if shown:
        print(flush=True)
    return tokens, text


def _refuse_missing(sources: list[str]) -> None:
    """Opens the media that need no network, before jax is imported and the weights are read."""
    from deepstack_jax.processing.sources import open_source

    class MediaError(ValueError):
        """Of its own: other ValueErrors are told as what they are."""

    for source in sources:
        if not source.strip().lower().startswith(("http:", "https:")):
            open_source(source, sys.maxsize, MediaError)


def _read_json(value: str, option: str, kind: type) -> Any:
    """The JSON of an option: its value, a file, or standard input.

    Raises:
        ValueError: the option, and the place where its JSON is damaged.
    """
    if value[:1] in ("[", "{"):
        text, where = value, option
    elif value == "-":
        text, where = sys.stdin.read(), f"{option} on standard input"
    else:
        where = f"{option} {value}"
        if not Path(value).is_file():
            raise ValueError(f"{where}: there is no such file: give an existing one, - or JSON")
        with naming(value):
            text = Path(value).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}): correct it") from None
    if not isinstance(found, kind):
        expected = "a list" if kind is list else "an object"
        raise ValueError(f"{where} holds {type(found).__name__}, not {expected}")
    return found

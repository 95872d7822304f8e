"""`bridgeport run`: pictures and a prompt through a bundle to text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...cli_options import PublicKey

if TYPE_CHECKING:
    from ..generation import Generation
    from ..pipeline import Pipeline
    from ..sources import Video


def run(
    bundle: Annotated[Path, typer.Argument(help="Directory that `bridgeport export` wrote.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture file; several run as one batch, each with the prompt. None: text alone."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(help="Animated GIF, WebP or PNG, or a directory of frames in name order; as --image."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text after the picture; without one the picture is captioned.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after that many tokens; the bundle's own limit by default.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0 samples; 0, the default, is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of that mass.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids what was said already.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="All pictures belong to one prompt, in front of it.")
    ] = False,
    interleave: Annotated[
        bool, typer.Option("--interleave", help="As --together, each picture at an {image} mark of the prompt.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes (one picture, no --json).")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads per stage; all cores by default.")] = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Capture the decode step once and replay it (--device cuda).")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="What runs the stages, as openvino; by default TensorRT for its engines, else ONNX Runtime."),
    ] = None,
    public_key: PublicKey = None,
    attention_map: Annotated[
        Path | None, typer.Option(help="Write a PNG of where each query looks (one picture).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer a prompt about a picture or video, or caption it, and time each stage."""
    from ...bundle import Bundle
    from ...errors import InputError
    from ...export.tensorrt.sign import verify_bundle
    from ..attention_map import check_attention_graph, check_target
    from ..pipeline import Pipeline
    from ..sources import Video

    pictures: list[Path | Video] = [*(image or []), *map(Video, video or [])]
    if attention_map is not None:
        if len(pictures) != 1 or video:
            raise InputError(f"--attention-map draws one picture, {len(pictures)} came; run it with one --image")
        check_target(attention_map)
    options: Any = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    loaded = Bundle.load(bundle) if public_key is None else verify_bundle(bundle, public_key)
    with Pipeline.load(loaded, device=device, threads=threads, engine=engine, cuda_graphs=cuda_graphs) as pipeline:
        if attention_map is not None:
            check_attention_graph(pipeline.bundle)  # before the text is out, not after
        one_prompt = together or interleave or len(pictures) < 2
        rows: list[list[Path | Video]] = [pictures] if one_prompt else [[picture] for picture in pictures]
        options["interleave"] = interleave
        if stream and not as_json and one_prompt:
            results = [_stream(pipeline, pictures or None, prompt, options)]
        else:
            results = pipeline.generate(rows if pictures else None, [prompt] * len(rows), **options)
            _print(rows, results, as_json=as_json)
        if attention_map is not None:
            _draw(pipeline, (image or [])[0], prompt, attention_map)
    typer.echo(_timings(results[0]), err=True)


def _stream(pipeline: Pipeline, image: list[Path | Video] | None, prompt: str, options: Any) -> Generation:
    with pipeline.stream(image, prompt, **options) as pieces:
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
        return pieces.generation


def _print(images: list[list[Path | Video]], results: list[Generation], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_document(images, results), indent=2, ensure_ascii=False))
        return
    for image, result in zip(images, results, strict=True):
        typer.echo(result.text if len(results) == 1 else f"{_name(image[0])}: {result.text}")


def _name(source: Path | Video) -> str:
    return str(source if isinstance(source, Path) else source.source)


def _document(images: list[list[Path | Video]], results: list[Generation]) -> dict[str, Any]:
    """One picture (or video): its result at the top. Several: `results`, and the batch's timings once."""
    records = [
        {
            "image": _name(image[0]) if len(image) == 1 else [_name(picture) for picture in image],
            "text": result.text,
            "token_ids": list(result.token_ids),
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
        }
        for image, result in zip(images, results, strict=True)
    ]
    shared = {"timings_ms": results[0].timings_ms, "tokens_per_second": results[0].tokens_per_second}
    return records[0] | shared if len(records) == 1 else {"results": records, **shared}


def _draw(pipeline: Pipeline, image: Path, prompt: str, target: Path) -> None:
    """Of a video, the first frame."""
    from ..attention_map import write_attention_map
    from ..processor import load_image

    picture = load_image(image)
    height, width = pipeline.manifest.stage("encoder").contract.input("pixel_values").shape[2:]
    write_attention_map(target, picture, pipeline.cross_attention(image, prompt)[0], int(height), int(width))
    typer.echo(f"wrote {target}", err=True)


def _timings(result: Generation) -> str:
    stages = ", ".join(f"{stage} {milliseconds:.0f} ms" for stage, milliseconds in result.timings_ms.items())
    rate = "" if result.tokens_per_second is None else f"; {result.tokens_per_second:.1f} tokens/s"
    return stages + rate

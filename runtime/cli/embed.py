"""`bridgeport embed`: a prompt with its pictures as embeddings, for another LLM engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def embed(
    bundle: Annotated[Path, typer.Argument(help="Directory that `bridgeport export` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for vLLM; directory for TensorRT-LLM.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="vllm|vllm-request|tensorrt-llm",
            help="vllm: the tensor that `prompt_embeds` takes. vllm-request: the body of POST /v1/completions. "
            "tensorrt-llm: token ids and prompt table, for TensorRT-Edge-LLM too.",
        ),
    ] = "vllm",
    image: Annotated[list[Path] | None, typer.Option(help="Picture file; several stand in one prompt.")] = None,
    prompt: Annotated[str, typer.Option(help="Text after the pictures.")] = "",
    interleave: Annotated[
        bool, typer.Option("--interleave", help="Each picture stands at an {image} mark of the prompt.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="Type of the embeddings in the file.")
    ] = "float32",
    model: Annotated[str, typer.Option(help="Name of the served model, for vllm-request.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens to ask for, in vllm-request.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads per stage; all cores by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Run the stages before the language model and write the prompt for vLLM or TensorRT-LLM."""
    from ..handover import check_request, check_target, embed_prompt, load_embedder, write_prompt

    form_checked, dtype_checked = check_request(form, dtype, model)
    read = (bundle, *(image or []))
    check_target(out, form_checked, force=force, protect=read)
    pictures: list[Any] = list(image or [])
    with load_embedder(bundle, device=device, threads=threads) as pipeline:
        embeddings = embed_prompt(pipeline, pictures or None, prompt, interleave=interleave)
    written: Any = {"dtype": dtype_checked, "model": model, "max_tokens": max_tokens, "force": force, "protect": read}
    target = write_prompt(embeddings, out, form_checked, **written)
    tokens, width = embeddings.inputs_embeds.shape
    features = len(embeddings.image_positions)
    typer.echo(f"wrote {target}: {tokens} tokens of {width}, {features} of them from pictures", err=True)

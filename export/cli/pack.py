"""`bridgeport pack`: a bundle as an archive that a bare board builds and checks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...cli_options import OptimizationLevel, PrivateKey, Profiles, TacticDram, Tf32, Workspace


def pack(
    bundle: Annotated[Path, typer.Argument(help="Bundle made for TensorRT (quantize --target tensorrt).")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.tar.gz", help="Archive to write.")],
    device: Annotated[
        str, typer.Option(help="local, orin-nano, orin-nx, agx-orin, thor, l4, h200, ...: where it will be built.")
    ] = "local",
    profile: Profiles = None,
    optimization_level: OptimizationLevel = None,
    workspace: Workspace = None,
    tactic_dram: TacticDram = None,
    tf32: Tf32 = False,
    strip: Annotated[bool, typer.Option("--strip", help="Plans without weights.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to record with; drawn ones by default.")
    ] = None,
    sign: PrivateKey = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Pack graphs, build scripts, recorded inputs and expected outputs for a board without this package."""
    from rich.console import Console

    from ..options import check_libraries
    from ..tensorrt.options import make_options
    from ..tensorrt.pack import pack_bundle

    options = make_options(
        optimization_level=optimization_level,
        workspace_mib=workspace,
        tactic_dram_mib=tactic_dram,
        tf32=tf32,
        strip=strip,
    )
    check_libraries()
    with Console(file=sys.stderr).status("starting") as status:
        archive = pack_bundle(
            bundle,
            out,
            device,
            profiles=profile or [],
            options=options,
            pictures=calibration,
            sign=sign,
            force=force,
            progress=status.update,
        )
    size = archive.stat().st_size
    if as_json:
        typer.echo(json.dumps({"archive": str(archive), "bytes": size, "device": device, "signed": sign is not None}))
        return
    folder = archive.name.removesuffix(".tar.gz")
    Console().print(
        f"{archive} has {size / 1e6:.1f} MB; on the board: tar xzf {archive.name} && cd {folder} && "
        "python3 build_and_check.py",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )

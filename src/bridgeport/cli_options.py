"""Options that several verbs of the command line have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code from the checkpoint directory (auto_map), with your rights, for config, tokenizer "
        "and processor; only for checkpoints that you trust.",
    ),
]
PublicKey = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Refuse a bundle that was not signed with this Ed25519 key (PEM)."),
]
PrivateKey = Annotated[Path | None, typer.Option(metavar="KEY", help="Sign with an Ed25519 key (PEM).")]

# How TensorRT builds: `build` and `pack`.
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'AXIS=MIN,OPT,MAX ...'",
        help="One optimization profile, as in 'batch=1,4,8 sequence=1,32,64'; STAGE.AXIS for one stage; repeat for "
        "several profiles. Axes that are not named keep the range that they were exported for.",
    ),
]
OptimizationLevel = Annotated[
    int | None, typer.Option(min=0, max=5, help="How long the builder searches; 3, less on small boards.")
]
Workspace = Annotated[int | None, typer.Option(min=1, metavar="MIB", help="Memory for layers while building.")]
TacticDram = Annotated[int | None, typer.Option(min=1, metavar="MIB", help="Memory for trying kernels.")]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let FP32 products be rounded to TF32.")]

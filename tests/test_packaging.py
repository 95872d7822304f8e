"""The wheel: what is in it, and that it runs bundles with its run-time dependencies alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
CODE = ("src/bridgeport", "models", "export", "calibration", "runtime")


def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked(folder: str) -> list[Path]:
    """Files below `folder` without caches; symlinks to the other three folders are not followed."""
    files: list[Path] = []
    for base, folders, names in os.walk(ROOT / folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not (Path(base) / name).is_symlink()]
        files += [Path(base) / name for name in names]
    return files


def import_name(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts[1:] if parts[0] == "src" else ("bridgeport", *parts))


def test_packages_are_every_folder_with_an_init() -> None:
    found = {import_name(path.parent) for folder in CODE for path in tracked(folder) if path.name == "__init__.py"}
    assert set(settings()["tool"]["setuptools"]["packages"]) == found


def test_no_python_file_at_the_root_or_outside_a_package() -> None:
    assert not list(ROOT.glob("*.py"))
    stray = [
        path
        for folder in CODE
        for path in tracked(folder)
        if path.suffix == ".py" and not (path.parent / "__init__.py").exists()
    ]
    assert not stray


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git would track, so that a build never writes into the working tree."""
    import shutil

    source = tmp_path_factory.mktemp("source")
    for folder in (*CODE[1:], "src"):
        shutil.copytree(
            ROOT / folder,
            source / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    # setuptools is the build backend; it need not be installed for the tests otherwise.
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_code_the_type_marker_and_the_small_model_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {
        import_name(path.parent).replace(".", "/") + "/" + path.name
        for folder in CODE
        for path in tracked(folder)
        if path.suffix == ".py"
    }
    data = {name for name in names if not name.endswith(".py")}
    model = {name for name in data if name.startswith("bridgeport/models/small/checkpoint/")}
    assert names - data == code
    tables = {f"bridgeport/export/preflight/data/{name}.json" for name in ("devices", "limits", "operators")}
    assert data - model == {"bridgeport/py.typed"} | tables
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {Path(name).name for name in model}
    assert wheel.stat().st_size < 9 * 2**20


def test_import_and_help_need_no_heavy_library_and_little_time() -> None:
    """CPU seconds, the best of five: wall time on a busy machine says nothing about the code."""
    program = (
        "import sys, time, contextlib, io\n"
        "import bridgeport, bridgeport.export, bridgeport.runtime, bridgeport.models\n"
        "from bridgeport.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out: status = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'onnxscript', 'tensorrt', 'matplotlib', 'numpy'}\n"
        "print(status, 'export' in out.getvalue(), sorted(heavy & set(sys.modules)), time.process_time())\n"
    )
    answers = []
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        answers.append(run.stdout.rsplit(" ", 1))
    assert answers[0][0] == "0 True []"
    assert min(float(seconds) for _, seconds in answers) < 0.5


RUN_WITHOUT_TORCH = """
import importlib.util, json, sys
from bridgeport.cli import main
absent = [name for name in ("torch", "transformers", "onnx", "safetensors") if importlib.util.find_spec(name) is None]
print(json.dumps(absent), file=sys.stderr)
sys.exit(main(sys.argv[1:]))
"""


def python_310() -> Path | None:
    """A Python 3.10 of this machine, as a JetPack 6 board has; None when there is none."""
    import shutil

    candidates = [Path(found) for found in [shutil.which("python3.10")] if found]
    candidates += sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python"))
    for candidate in candidates:
        probe = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        if probe.returncode == 0 and probe.stdout.startswith("Python 3.10."):
            return candidate
    return None


@pytest.mark.parametrize("version", ["this Python", pytest.param("Python 3.10", marks=pytest.mark.slow)])
def test_wheel_runs_a_bundle_with_its_run_time_dependencies_alone(
    version: str, wheel: Path, small_bundle: Path, held_out_picture: Path, tmp_path: Path
) -> None:
    interpreter = Path(sys.executable) if version == "this Python" else python_310()
    if interpreter is None:
        pytest.skip("no Python 3.10 on this machine; put `python3.10` on the PATH to run this")
    subprocess.run([interpreter, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]"],
        check=True,
        capture_output=True,
        text=True,
    )
    run = subprocess.run(
        [
            python,
            "-c",
            RUN_WITHOUT_TORCH,
            "run",
            small_bundle,
            "--image",
            held_out_picture,
            "--prompt",
            "",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stderr.splitlines()[0]) == ["torch", "transformers", "onnx", "safetensors"]
    answer = json.loads(run.stdout)
    from bridgeport.runtime import Pipeline

    with Pipeline.load(small_bundle) as pipeline:
        here = pipeline.generate(held_out_picture, "")
    assert answer["text"] == here.text
    assert answer["text"]

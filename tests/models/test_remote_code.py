"""Python code that comes with a checkpoint: refused without running it, run where the caller allows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints_llava import write_llava_checkpoint

import bridgeport.export.checkpoint as export
from bridgeport.cli import main
from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.export.checkpoint_processor import load_processor, load_tokenizer
from bridgeport.models import load_checkpoint
from bridgeport.models.remote_code import remote_code
from bridgeport.runtime import check_parity

# Each file leaves a mark where it ran.
MARK = "from pathlib import Path\n(Path({ran!r}) / {name!r}).touch()\n"
CODE = {
    "configuration_theirs": """
from transformers import LlavaConfig
class TheirConfig(LlavaConfig):
    model_type = "theirs"
    def __init__(self, layer_of_theirs=None, **rest):
        super().__init__(**(rest | ({"vision_feature_layer": layer_of_theirs} if layer_of_theirs else {})))
""",
    "processing_theirs": """
from transformers import LlavaProcessor
class TheirProcessor(LlavaProcessor):
    pass
""",
    "tokenization_theirs": """
from transformers import PreTrainedTokenizerFast
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
""",
    "modeling_theirs": "raise SystemExit('model code ran')\n",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    path = tmp_path_factory.mktemp("remote") / "plain"
    write_llava_checkpoint(path)
    return path


@pytest.fixture
def theirs(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaVA whose config, tokenizer and processor are classes of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    path = tmp_path / "theirs"
    shutil.copytree(plain, path)
    (path / "ran").mkdir()
    for name, code in CODE.items():
        (path / f"{name}.py").write_text(MARK.format(ran=str(path / "ran"), name=name) + code)
    edit(
        path / "config.json",
        auto_map={
            "AutoConfig": "configuration_theirs.TheirConfig",
            "AutoModelForImageTextToText": "modeling_theirs.TheirModel",
        },
    )
    edit(path / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_theirs.TheirTokenizer"]})
    edit(path / "processor_config.json", auto_map={"AutoProcessor": "processing_theirs.TheirProcessor"})
    return path


def edit(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | changes))


def ran(path: Path) -> set[str]:
    return {file.name for file in (path / "ran").iterdir()}


def test_refused_without_running(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match=r"config\.json: auto_map asks to run Python code .*--trust-remote-code"):
        load_checkpoint(theirs)
    assert main(["export", str(theirs), "-o", str(tmp_path / "bundle")]) != 0
    message = " ".join(capsys.readouterr().err.split())
    assert "--trust-remote-code" in message
    assert "with your rights, so pass it only for a checkpoint that you trust" in message
    assert not (tmp_path / "bundle").exists()
    assert ran(theirs) == set()


def test_a_part_of_the_config_that_asks_for_code_is_refused(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "part"
    shutil.copytree(plain, path)
    text = json.loads((path / "config.json").read_text())["text_config"]
    edit(path / "config.json", text_config=text | {"auto_map": {"AutoModel": "modeling_x.X"}})
    with pytest.raises(UnsupportedError, match="auto_map asks to run Python code"):
        load_checkpoint(path)


@pytest.mark.parametrize("allowed", [False, True])
def test_an_architecture_that_no_reader_knows_is_refused_either_way(theirs: Path, allowed: bool) -> None:
    edit(theirs / "config.json", model_type="never_heard_of")
    with (
        remote_code(allowed=allowed),
        pytest.raises(CheckpointError, match=r"'never_heard_of' is unknown; .*code that comes with a checkpoint"),
    ):
        load_checkpoint(theirs)
    edit(theirs / "config.json", model_type="llava", architectures=["TheirModel"])
    with (
        remote_code(allowed=allowed),
        pytest.raises((CheckpointError, UnsupportedError), match="'TheirModel' is unknown" if allowed else "auto_map"),
    ):
        load_checkpoint(theirs)
    assert ran(theirs) == set()


def test_config_of_their_own(theirs: Path) -> None:
    edit(theirs / "config.json", layer_of_theirs=-1)
    with remote_code(allowed=True):
        model = load_checkpoint(theirs)
    assert ran(theirs) == {"configuration_theirs"}
    assert (type(model.config).__name__, model.config.vision_feature_layer) == ("LlavaConfig", -1)
    with pytest.raises(UnsupportedError, match="auto_map"):
        load_checkpoint(theirs)  # the leave has ended


def test_code_of_another_repository_is_refused_either_way(theirs: Path) -> None:
    edit(theirs / "config.json", auto_map={"AutoConfig": "owner/name--configuration_theirs.TheirConfig"})
    with (
        remote_code(allowed=True),
        pytest.raises(UnsupportedError, match=r"owner/name--configuration_theirs\.TheirConfig, code of another"),
    ):
        load_checkpoint(theirs)


def test_code_that_fails_is_an_error_of_one_line(theirs: Path) -> None:
    (theirs / "configuration_theirs.py").write_text("raise ZeroDivisionError('two\\nlines')\n")
    with (
        remote_code(allowed=True),
        pytest.raises(CheckpointError, match=r"the code that auto_map names failed \(ZeroDivisionError: two lines\)"),
    ):
        load_checkpoint(theirs)


def test_processor_and_tokenizer_of_their_own(theirs: Path) -> None:
    # transformers has these classes itself, so they load without the checkpoint's code.
    assert type(load_tokenizer(theirs)).__name__ != "TheirTokenizer"
    assert ran(theirs) == set()
    with remote_code(allowed=True):
        assert type(load_processor(theirs)).__name__ == "TheirProcessor"
        assert type(load_tokenizer(theirs)).__name__ == "TheirTokenizer"
    assert ran(theirs) >= {"processing_theirs", "tokenization_theirs"}
    assert "modeling_theirs" not in ran(theirs)


def test_the_flag_reaches_config_and_processor(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise CheckpointError("all is frozen")

    monkeypatch.setattr(export, "_keep_config", stop)
    assert main(["export", str(theirs), "-o", str(tmp_path / "bundle"), "--trust-remote-code"]) != 0
    assert "all is frozen" in capsys.readouterr().err
    assert ran(theirs) == {"configuration_theirs", "processing_theirs", "tokenization_theirs"}


@pytest.mark.slow
def test_export_and_parity_with_leave(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    bundle = export.export_checkpoint(theirs, tmp_path / "bundle", trust_remote_code=True)
    assert ran(theirs) == {"configuration_theirs", "processing_theirs", "tokenization_theirs"}
    with pytest.raises(UnsupportedError, match="--trust-remote-code"):
        check_parity(bundle, theirs)
    report = check_parity(bundle, theirs, threads=1, max_new_tokens=2, trust_remote_code=True)
    assert report.passed


@pytest.mark.parametrize("verb", ["export", "parity"])
def test_help_says_what_the_flag_does(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "--trust-remote-code" in text
    assert "Run Python code from the checkpoint directory (auto_map), with your rights" in text
    assert "only for checkpoints that you trust" in text

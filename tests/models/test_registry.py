"""Connectors from outside the package, by the decorator or an entry point, and everything that is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint
from torch import Tensor, nn

from bridgeport.errors import CheckpointError, InputError
from bridgeport.models import load_checkpoint, register_connector, registry

LLAVA = ["LlavaForConditionalGeneration"]
# A package as pip leaves it: the module, and metadata with an entry point.
PLUGIN = '''
from bridgeport.models import register_connector
from torch import nn

BOTH = ["LlavaForConditionalGeneration", "Blip2ForConditionalGeneration"]

@register_connector("thirds", architectures=BOTH, tokens=3)
class Thirds(nn.Module):
    """The means of the first three tokens and of all, projected."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, image_embeds):
        return self.linear(image_embeds[:, :3] + image_embeds.mean(dim=1, keepdim=True))
'''


@pytest.fixture(autouse=True)
def only_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTERED", {})


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of `sys.path` with the installed package `thirds`."""
    site = tmp_path / "site"
    install(site, "thirds_package", PLUGIN, "thirds = thirds_package")
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("thirds_package", None)


def install(site: Path, module: str, code: str, entry: str) -> None:
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entry}\n")


def with_connector(checkpoint: Path, out: Path, name: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """A copy of `checkpoint` whose config.json names the connector `name`, with its tensors."""
    out.mkdir()
    for file in checkpoint.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {registry.KEY: name}))
    weights = load_file(out / "model.safetensors") | (tensors or {})
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def linear(inputs: int, outputs: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "connector.linear.weight": torch.randn(outputs, inputs, generator=generator) / inputs**0.5,
        "connector.linear.bias": torch.randn(outputs, generator=generator),
    }


def test_an_installed_package_is_imported_when_a_checkpoint_names_it(llava: Path, plugin: Path, tmp_path: Path) -> None:
    load_checkpoint(llava)
    assert "thirds_package" not in sys.modules
    model = load_checkpoint(with_connector(llava, tmp_path / "checkpoint", "thirds", linear(24)))
    contract = model.contracts["connector"]
    assert (contract.inputs[0].shape, contract.outputs[0].shape) == (("batch", 16, 24), ("batch", 3, 32))
    assert list(model.contracts) == ["encoder", "connector", "embed_tokens", "llm"]
    assert model.layout.custom_connector == "thirds"
    x = torch.randn(2, 16, 24)
    weights = linear(24)
    expected = (x[:, :3] + x.mean(1, keepdim=True)) @ weights["connector.linear.weight"].T
    torch.testing.assert_close(model.connector(x), expected + weights["connector.linear.bias"], rtol=1e-5, atol=1e-5)


def test_one_connector_for_both_kinds(plugin: Path, tmp_path: Path) -> None:
    blip2 = write_blip2_checkpoint(tmp_path / "blip2", vision_layers=1, qformer_layers=1, num_layers=1)
    config = json.loads((blip2 / "config.json").read_text())
    widths = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    model = load_checkpoint(with_connector(blip2, tmp_path / "checkpoint", "thirds", linear(*widths)))
    assert model.contracts["connector"].outputs[0].shape == ("batch", 3, widths[1])


def test_tables_that_a_module_computes_and_names_of_older_releases(llava: Path, tmp_path: Path) -> None:
    """`save_pretrained` writes "multi_modal_projector.", the stages say "model.multi_modal_projector."."""

    @register_connector("scaled", architectures=LLAVA, tokens=16, stored_name="multi_modal_projector.")
    class Scaled(nn.Module):
        table: Tensor

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.linear_1 = nn.Linear(config.vision_config.hidden_size, 32)
            self.linear_2 = nn.Linear(32, 32)
            self.register_buffer("table", torch.arange(16.0)[:, None], persistent=False)
            self.plain = torch.tensor(2.0)

        def forward(self, image_embeds: Tensor) -> Tensor:
            scaled: Tensor = self.linear_2(self.linear_1(image_embeds)) * self.table * self.plain
            return scaled

    model = load_checkpoint(with_connector(llava, tmp_path / "checkpoint", "scaled"))
    weights = load_file(llava / "model.safetensors")
    first, second = (weights[f"multi_modal_projector.linear_{i}.weight"] for i in (1, 2))
    biases = [weights[f"multi_modal_projector.linear_{i}.bias"] for i in (1, 2)]
    x = torch.randn(1, 16, 24)
    expected = ((x @ first.T + biases[0]) @ second.T + biases[1]) * torch.arange(16.0)[:, None] * 2
    torch.testing.assert_close(model.connector(x), expected, rtol=1e-5, atol=1e-4)


def test_an_unknown_name_lists_the_known_ones(llava: Path, plugin: Path, tmp_path: Path) -> None:
    register_connector("mine", architectures=LLAVA, tokens=1)(lambda config: nn.Identity())
    with pytest.raises(
        CheckpointError, match=r"bridgeport_connector is 'other'; known are mine, simplified-qformer, thirds; install"
    ):
        load_checkpoint(with_connector(llava, tmp_path / "checkpoint", "other"))
    with pytest.raises(
        CheckpointError, match=r"bridgeport_connector is \['mine'\]; known are mine, simplified-qformer, thirds"
    ):
        load_checkpoint(with_connector(llava, tmp_path / "list", ["mine"]))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"bad_package of the group bridgeport.connectors does not import \(ZeroDivisionError: division"),
        ("", r"bad_package was imported and registered no connector 'bad'; decorate"),
    ],
)
def test_a_package_that_does_not_register(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    install(tmp_path / "site", "bad_package", code, "bad = bad_package")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(with_connector(llava, tmp_path / "checkpoint", "bad"))
    sys.modules.pop("bad_package", None)


class Narrow(nn.Module):
    """Keeps the encoder's width."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, image_embeds: Tensor) -> Any:
        return image_embeds


class Baked(Narrow):
    """One picture, whatever came."""

    def forward(self, image_embeds: Tensor) -> Any:
        return torch.zeros(1, 16, 32)


class Pair(Narrow):
    def forward(self, image_embeds: Tensor) -> Any:
        return image_embeds, image_embeds


class Failing(Narrow):
    def forward(self, image_embeds: Tensor) -> Any:
        raise RuntimeError("no\nidea")


def raising(config: Any) -> nn.Module:
    raise KeyError("my_setting")


@pytest.mark.parametrize(
    ("factory", "tokens", "message"),
    [
        (Narrow, 16, r"Narrow\) makes torch.float32 \[1, 16, 24\] of image_embeds .*its contract is .*\[1, 16, 32\]"),
        (Baked, 16, r"Baked\) makes torch.float32 \[1, 16, 32\] of image_embeds \[3, 16, 24\]"),
        (Pair, 16, r"makes a tuple of image_embeds"),
        (Failing, 16, r"fails on image_embeds \[1, 16, 24\]: it raised RuntimeError: no idea; its forward"),
        (raising, 16, r"raising\) cannot be built: it raised KeyError: 'my_setting'; correct it$"),
        (lambda config: 3, 16, r"gave a int; it must give a torch.nn.Module"),
        (Narrow, 0, r"tokens is 0; accepted is a whole number from 1"),
        (Narrow, lambda config: config.nothing, r"tokens\(config\) raised AttributeError: .*nothing"),
    ],
)
def test_what_breaks_its_contract(llava: Path, tmp_path: Path, factory: Any, tokens: Any, message: str) -> None:
    register_connector("mine", architectures=LLAVA, tokens=tokens)(factory)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(with_connector(llava, tmp_path / "checkpoint", "mine"))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit(llava: Path, plugin: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor connector.linear.weight of shape \[32, 24\] is missing"):
        load_checkpoint(with_connector(llava, tmp_path / "none", "thirds"))
    with pytest.raises(CheckpointError, match=r"connector.linear.weight has shape \[32, 20\], but .* \[32, 24\]"):
        load_checkpoint(with_connector(llava, tmp_path / "narrow", "thirds", linear(20)))
    more = {**linear(24), "connector.other": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"tensor connector.other of shape \[1\] has no place in the model"):
        load_checkpoint(with_connector(llava, tmp_path / "more", "thirds", more))


def test_another_architecture(llava: Path, tmp_path: Path) -> None:
    register_connector("mine", architectures=["Blip2ForConditionalGeneration"], tokens=1)(Narrow)
    with pytest.raises(CheckpointError, match=r"is for Blip2ForConditionalGeneration; config.json says Llava"):
        load_checkpoint(with_connector(llava, tmp_path / "checkpoint", "mine"))
    with pytest.raises(InputError, match=r"architectures are \['CLIPModel'\]; accepted is a list of Llava"):
        register_connector("clip", architectures=["CLIPModel"], tokens=1)
    with pytest.raises(InputError, match=r"the name is taken by connector 'mine' \(.*Narrow\)"):
        register_connector("mine", architectures=LLAVA, tokens=1)(Baked)

"""The one format of tensor files: what is written comes back, and every damage is the owner's error."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_precision.checkpoints.tensor_file import TensorFile, named, shapes_of
from moe_precision.layers.shape import LayerShape
from moe_precision.quantize.codec.grid import Grid, GridError
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.history import HistoryError, RouterNormHistory


class OwnError(Exception):
    """Of what the file holds."""


FILE = TensorFile("test-numbers", 3, OwnError, "numbers")
METADATA = {"format": "test-numbers", "version": "3"}
LAYERS = {"a.b": LayerShape("a.b.gate", 2, {"wi": (8, 4), "wo": (4, 8)})}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def test_tensors_and_metadata_come_back(path):
    nested = {"a.b": {"wi": torch.arange(3.0), "wo": torch.ones(2, 2).T}}
    tensors = named("rows", nested) | named("norms", {"a.b": torch.zeros(2)})
    FILE.save(path, tensors, text="plain", number=4, layers=shapes_of(LAYERS))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"rows/a.b/wi", "rows/a.b/wo", "norms/a.b"}
        assert file.metadata() == {
            **METADATA,
            "text": "plain",
            "number": "4",
            "layers": '{"a.b": {"router": "a.b.gate", "num_experts": 2, "projections": {"wi": [8, 4], "wo": [4, 8]}, '
            '"experts": ""}}',
        }
    found = FILE.load(path)
    assert (found.text("text"), found.decoded("number"), found.layers()) == ("plain", 4, LAYERS)
    assert (found.text("other", "default"), found.decoded("other", "[1]")) == ("default", [1])
    torch.testing.assert_close(found.nested("rows", LAYERS), nested)
    torch.testing.assert_close(found.by_layer("norms", ["a.b", "c"]), {"a.b": torch.zeros(2)})
    assert found.tensor("rows/a.b/wi", (3,)).tolist() == [0.0, 1.0, 2.0]


def test_no_file(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"no numbers at '.*x\.safetensors'"):
        FILE.load(path)
    with pytest.raises(FileNotFoundError, match="no numbers at"):
        FILE.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"text that is no safetensors file", None])
def test_a_truncated_file_and_one_of_another_kind(content, path):
    FILE.save(path, {"x": torch.zeros(4)})
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(OwnError, match=r"x\.safetensors' is truncated, or not a numbers file: .*\. Copy it again"):
        FILE.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "has no format in its metadata, expected 'test-numbers': give the file that holds the numbers"),
        ({"format": "pt"}, "is of format 'pt', expected 'test-numbers'"),
        ({**METADATA, "version": "4"}, "is of version 4 of test-numbers, this release reads version 3: read it with"),
        ({"format": "test-numbers"}, "is of version None of test-numbers"),
    ],
)
def test_another_format_or_version(metadata, message, path):
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(OwnError, match=rf"x\.safetensors' {message}"):
        FILE.load(path)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda file: file.tensor("y"), "it has no tensor 'y'"),
        (lambda file: file.tensor("x", (2, 3)), r"tensor 'x' has shape \(4,\), expected \(2, 3\)"),
        (lambda file: file.nested("rows", LAYERS), "it has no tensor 'rows/a.b/wi'"),
        (lambda file: file.text("other"), "it has no 'other' in its metadata"),
        (lambda file: file.decoded("other"), "it has no 'other' in its metadata"),
        (lambda file: file.decoded("text"), r"'text' in its metadata is not JSON \(Expecting value"),
        (lambda file: file.layers(), "'layers' in its metadata describes no layers"),
    ],
)
def test_a_part_that_is_missing_or_damaged(read, message, path):
    FILE.save(path, {"x": torch.zeros(4)}, text="plain", layers=[1, 2])
    with pytest.raises(OwnError, match=rf"x\.safetensors' is not an intact numbers file: {message}.*Copy it again"):
        read(FILE.load(path))


def test_a_file_that_cannot_be_written_leaves_the_old_one(path, monkeypatch):
    FILE.save(path, {"x": torch.zeros(4)})
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        FILE.save(path, {"x": torch.ones(4)})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("owner", "error", "what"),
    [
        (RouterNormHistory, HistoryError, "router-norm history"),
        (Curvature, CurvatureError, "curvature"),
        (Grid, GridError, "grid"),
    ],
)
def test_each_owner_has_its_own_error(owner, error, what, path):
    with pytest.raises(FileNotFoundError, match=f"no {what} at"):
        owner.load(path)
    FILE.save(path, {"x": torch.zeros(4)})
    with pytest.raises(error, match=rf"expected 'moe-precision-\w+': give the file that holds the {what}"):
        owner.load(path)
    path.write_bytes(b"")
    with pytest.raises(error, match=f"truncated, or not a {what} file"):
        owner.load(path)

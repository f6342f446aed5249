"""Images in every form against the same pixels in a file, and transformers' own reading of arrays."""

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.hf.image_loading_saisa import list_images, load_image
from model.hf.image_processing_saisa import SaisaImageProcessor
from tests.transformers_versions import CLIPImageProcessor

SIZES: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


def read(source: Any, **options: Any) -> np.ndarray:
    return np.asarray(load_image(source, **options))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A PNG whose name must be escaped in a URL."""
    path = tmp_path / "a photo #1%.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def server(file: Path) -> Iterator[str]:
    """Serves the photo as /photo, redirects /moved to it and /inside to the file, and knows nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = {"/moved": "/photo", "/inside": file.as_uri()}.get(self.path)
            self.send_response(302 if where else 200 if self.path == "/photo" else 404)
            if where:
                self.send_header("Location", where)
            self.end_headers()
            if self.path == "/photo":
                self.wfile.write(file.read_bytes())

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_names_and_contents_of_a_file(file: Path, server: str) -> None:
    text = base64.b64encode(file.read_bytes()).decode()
    wrapped = base64.encodebytes(file.read_bytes()).decode()
    sources = [file, str(file), file.as_uri(), file.read_bytes(), text, wrapped, f"data:image/png;base64,{text}"]
    for source in [*sources, f"{server}/photo", f"{server}/moved"]:
        assert np.array_equal(read(source), PIXELS), source
    image = Image.open(file)
    assert load_image(image) is image


def test_a_page_cannot_name_a_file_of_ours(file: Path, server: str) -> None:
    with pytest.raises(ValueError, match=r"/inside: no image there \(.*302"):
        load_image(f"{server}/inside")
    with pytest.raises(ValueError, match=r"/missing: no image there \(.*404"):
        load_image(f"{server}/missing")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.png", ValueError, "'missing.png': no such file, and not the base64 text of an image"),
        ("QUJD" * 100, ValueError, r"QUJD\.\.\. \(400 characters\)': no such file, and not the base64"),
        ("file:///missing.png", ValueError, "file:///missing.png: no image there"),
        ("data:image/png;base64,QUJD", ValueError, "no image there"),
        (Path("missing.png"), FileNotFoundError, "missing.png"),
        (3, TypeError, "an image is of type int; give a file, a URL"),
        (np.zeros((5, 5, 2), np.uint8), ValueError, r"shape \[5, 5, 2\], with neither 1, 3 nor 4 channels"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"shape \[0, 5, 3\]"),
        (np.zeros(5, np.uint8), ValueError, r"shape \[5\]"),
        (np.full((5, 5, 3), 256), ValueError, "array of int64 from 256 to 256; give 0 to 255"),
        (torch.full((3, 5, 5), -0.1), ValueError, "array of float32 from -0.1 to -0.1; .* before any normalisation"),
        (np.full((5, 5, 3), np.nan), ValueError, "array of float64 from nan to nan"),
        (np.zeros((5, 5, 3), complex), ValueError, "array of complex128"),
    ],
)
def test_what_cannot_be_read_is_named(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_image(source)


def test_values_and_channels_of_arrays() -> None:
    gray, alpha = PIXELS[..., :1], np.dstack([PIXELS, PIXELS[..., 0]])
    floats = PIXELS.astype(np.float32) / 255
    for source in (
        PIXELS, PIXELS.transpose(2, 0, 1), PIXELS.astype(np.int64), PIXELS.astype(np.float64), floats,
        PIXELS.astype(np.uint16) * 257, torch.from_numpy(floats).permute(2, 0, 1).requires_grad_(),
    ):  # fmt: skip
        assert np.array_equal(read(source), PIXELS)
    for source in (gray, gray[..., 0], gray.transpose(2, 0, 1)):
        assert np.array_equal(read(source), gray[..., 0]) and load_image(source).mode == "L"
    for source in (alpha, alpha.transpose(2, 0, 1)):
        assert np.array_equal(read(source), alpha) and load_image(source).mode == "RGBA"
    assert read(np.ones((5, 5, 3), np.float32)).min() == 255, "floats up to 1 are fractions of white"
    assert read(np.eye(5, dtype=bool)).tolist() == (255 * np.eye(5)).tolist()
    assert np.abs(read(torch.from_numpy(floats).to(torch.bfloat16)).astype(int) - PIXELS).max() <= 1


def test_a_shape_that_can_be_either_is_read_as_transformers_does() -> None:
    array = PIXELS[:3, :9]
    assert load_image(array).size == (3, 9) and load_image(array, "channels_last").size == (9, 3)
    assert np.array_equal(read(array, input_data_format="channels_last"), array)
    found = SaisaImageProcessor(**SIZES)(array, input_data_format="channels_last", return_tensors="np")
    expected = CLIPImageProcessor(**SIZES)(array, input_data_format="channels_last", return_tensors="np")
    assert np.array_equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("form", ["HWC", "CHW", "float", "tensor", "batch"])
def test_pixels_of_arrays_equal_transformers(form: str) -> None:
    """Floats of 0..1 must be announced to transformers with `do_rescale=False`; it then cuts where we round."""
    square = PIXELS[:, :30]
    arrays: dict[str, Any] = {
        "HWC": square,
        "CHW": square.transpose(2, 0, 1),
        "float": square.astype(np.float64) / 255,
        "tensor": torch.from_numpy(square.copy()).permute(2, 0, 1),
        "batch": np.stack([square, square[::-1]]),
    }
    options = {"do_rescale": False} if form == "float" else {}
    expected = CLIPImageProcessor(**SIZES)(arrays[form], return_tensors="pt", **options)["pixel_values"]
    found = SaisaImageProcessor(**SIZES)(arrays[form], return_tensors="pt")["pixel_values"]
    # One level of 255 over the smallest deviation is 0.0150.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.016 if form == "float" else 0)


def test_pixels_stay_as_stored(tmp_path: Path) -> None:
    """The loader of transformers would turn the image by its EXIF orientation and drop its transparency."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.dstack([PIXELS, np.zeros_like(PIXELS[..., 0])])).save(tmp_path / "clear.png")
    assert np.array_equal(read(str(tmp_path / "turned.png")), PIXELS)
    white = SaisaImageProcessor(**SIZES)(tmp_path / "clear.png", return_tensors="np")["pixel_values"]
    assert np.array_equal(white, SaisaImageProcessor(**SIZES)(Image.new("RGB", (30, 30), "white"))["pixel_values"])


def test_nested_lists_become_one() -> None:
    batch = torch.zeros(2, 3, 4, 4)
    assert list_images(None) == list_images([]) == list_images([[], []]) == []
    assert list_images(["a", ["b", "c"]]) == ["a", "b", "c"]
    assert [tuple(image.shape) for image in list_images([batch, batch[0]])] == [(3, 4, 4)] * 3


def test_what_would_run_a_program_is_no_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "eps")
    assert Image.open(buffer).format == "EPS", "which Pillow decodes with Ghostscript"
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    text = base64.b64encode(buffer.getvalue()).decode()
    data_url = f"data:image/png;base64,{text}"
    for source in (buffer.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png"), text, data_url):
        with pytest.raises((OSError, ValueError), match="cannot identify|no image there|not the base64 text of an"):
            load_image(source)


def test_bytes_of_other_formats_are_read() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "webp", lossless=True)
    assert np.array_equal(read(buffer.getvalue()), PIXELS)

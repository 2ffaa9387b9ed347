import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch.testing import assert_close

import taildropout as td
from taildropout.demo import data
from taildropout.demo.cli import TOLERANCE, main
from taildropout.demo.model import Autoencoder, pca_errors, train


def idx(pixels):
    """An IDX file of images, byte by byte."""
    sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
    return bytes([0, 0, 8, pixels.ndim]) + sizes + pixels.tobytes()


def images(count, seed=0):
    """Small smooth pictures, so that there is something to learn."""
    waves = np.random.default_rng(seed).uniform(0.2, 1.5, size=(count, 2, 1))
    rows, columns = np.sin(waves[:, :1] * np.arange(6)), np.cos(waves[:, 1:] * np.arange(5))
    return (127 * (1 + rows.transpose(0, 2, 1) * columns)).astype(np.uint8)


LABELS = (np.arange(60) % 10).astype(np.uint8)
CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat"]
CLOTHES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]


@pytest.fixture
def folder(tmp_path):
    """Like Fashion-MNIST, but 300 + 60 images of 6 x 5 pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images(300)))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images(60, seed=1))))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    return folder


# --- data -------------------------------------------------------------------------------------


def test_idx_files_are_read_plain_and_gzipped(folder):
    loaded = data.load_fashion_mnist(folder)
    assert (loaded.height, loaded.width) == (6, 5)
    assert_close(loaded.train, torch.tensor(images(300)).flatten(1) / 255, rtol=0, atol=0)
    assert_close(loaded.test, torch.tensor(images(60, seed=1)).flatten(1) / 255, rtol=0, atol=0)
    assert loaded.test_labels == 6 * CLOTHES
    assert loaded.contrast is not None
    assert set(loaded.contrast["shoes"]) == {"sandal", "sneaker", "ankle boot"}
    assert set(loaded.contrast["shirts"]) == {"T-shirt", "pullover", "coat", "shirt"}


def test_without_a_file_of_labels_there_are_none(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    loaded = data.load_fashion_mnist(folder)
    assert len(loaded.test) == 60
    assert loaded.test_labels is None
    assert loaded.contrast is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS[:59], "must hold a label below 10 for each of 60 images, got 59 labels up to 9"),
        (LABELS + 1, "must hold a label below 10 for each of 60 images, got 60 labels up to 10"),
        (images(60), "must be an IDX file of labels"),
    ],
)
def test_wrong_labels_are_refused(folder, labels, words):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(data.DataError, match=f"{path} {words}"):
        data.load_fashion_mnist(folder)


GOOD = idx(images(3))
DAMAGED = {
    "labels": (idx(np.arange(3, dtype=np.uint8)), "must be an IDX file of images"),
    "floats": (GOOD[:2] + b"\x0d" + GOOD[3:], "must be an IDX file of images"),
    "truncated": (GOOD[:-1], "must hold 3 x 6 x 5 pixels, got 89 bytes"),
    "too long": (GOOD + b"0", "must hold 3 x 6 x 5 pixels, got 91 bytes"),
    "no images": (idx(images(0)), "must hold 0 x 6 x 5 pixels"),
    "empty": (b"", "must be an IDX file of images"),
    "sizes cut off": (GOOD[:9], "must be an IDX file of images"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, damage):
    content, words = DAMAGED[damage]
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=f"{path} {words}"):
        data.read_idx_images(path)


def test_a_truncated_gzip_file_cannot_be_read(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(data.DataError, match="can't be read"):
        data.read_idx_images(path)


def test_a_gzip_file_with_one_wrong_byte_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    whole = gzip.compress(GOOD, mtime=0)
    for i in range(10, len(whole)):  # behind the header, where a wrong time does no harm
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        with pytest.raises(data.DataError, match=re.escape(str(path))):
            data.read_idx_images(path)


def test_sizes_that_differ_are_refused(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images(9)[:, :4])))
    with pytest.raises(data.DataError, match="must have one size, got 6 x 5 and 4 x 5"):
        data.load_fashion_mnist(folder)


def test_missing_files_say_both_ways_to_get_them(tmp_path):
    with pytest.raises(data.DataError, match=r"apt-get install dataset-fashion-mnist.*--data-dir"):
        data.load_fashion_mnist(tmp_path)


@pytest.mark.slow
def test_the_digits_are_split_into_disjoint_parts():
    digits = data.load_digits()
    assert digits.train.shape == (1400, 64)
    assert digits.test.shape == (397, 64)
    assert digits.height * digits.width == 64
    everything = torch.cat([digits.train, digits.test])
    assert (everything.min(), everything.max()) == (0, 1)
    assert torch.cdist(digits.test, digits.train).min() > 0
    everywhere = [int(label) for label in digits.test_labels]
    rows = [
        int((pixels == torch.tensor(load_digits().data / 16)).all(1).nonzero()[0])
        for pixels in digits.test
    ]
    assert everywhere == load_digits().target[rows].tolist()
    again = data.load_digits()
    assert_close(again.train, digits.train, rtol=0, atol=0)


def test_pca_errors_are_those_of_scikit_learn():
    digits = data.load_digits()
    errors = pca_errors(digits.train, digits.test, [0, 1, 5, 64])
    x, y = digits.train.double().numpy(), digits.test.double().numpy()
    assert errors[0] == pytest.approx(((y - x.mean(0)) ** 2).mean())
    for k, error in zip([1, 5, 64], errors[1:], strict=True):
        pca = PCA(k, svd_solver="full").fit(x)
        expected = ((pca.inverse_transform(pca.transform(y)) - y) ** 2).mean()
        assert error == pytest.approx(expected, abs=1e-12)


# --- the whole path -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_path(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(f"demo --data fashion-mnist --data-dir {folder} --width 5 --epochs 30 --out {out}".split())
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "model.safetensors",
        "reconstructions.png",
        "report.html",
        "results.json",
        "scree.png",
    ]
    results = json.loads((out / "results.json").read_text())
    scree = td.Scree.from_dict(results["scree"])
    assert scree.ks == [0, 1, 2, 3, 4, 5]
    assert scree.count == 60
    k = scree.choose(TOLERANCE)
    assert results["chosen_k"] == k
    assert results["reloaded_equal"] is True
    assert results["largest_difference"] < 1e-5

    rows = re.findall(r"^ +(\d+)  ([\d.]+) ± ([\d.]+) +([\d.]+) +([\d,]+)(.*)$", printed, re.M)
    assert [int(row[0]) for row in rows] == scree.ks
    for i, row in enumerate(rows):
        assert float(row[1]) == pytest.approx(float(scree.loss[i]), abs=1e-5)
        assert float(row[2]) == pytest.approx(float(scree.stderr[i]), abs=1e-5)
        assert float(row[3]) == pytest.approx(results["pca"][i], abs=1e-5)
        assert int(row[4].replace(",", "")) == results["parameters"][i]
        assert ("chosen" in row[5]) == (i == k)

    assert f"chosen: k = {k}," in printed
    assert f"at k = {k}: {results['largest_difference']:.1e}\n" in printed

    saved = load_file(out / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == results["parameters_after"]
    assert results["parameters_after"] == results["parameters"][k]
    whole = sum(p.numel() for p in Autoencoder(30, 5).parameters())
    assert results["parameters_before"] == results["parameters"][-1] == whole
    for name in ("scree.png", "reconstructions.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    html = (out / "report.html").read_text()
    page = json.loads(re.search(r'type="application/json">(.*?)</script>', html)[1])
    assert page["chosen"] == k
    assert page["loss"] == results["scree"]["loss"]
    assert page["costs"]["parameters"] == results["parameters"]
    assert len(page["images"]["outputs"]) == 6
    assert page["images"]["names"] == (6 * CLOTHES)[:24]
    assert page["scatter"]["contrast"]["counts"] == [18, 24]
    assert "report.html" in printed.splitlines()[-1]


@pytest.mark.slow
def test_without_labels_the_report_has_no_colours(folder, tmp_path):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    options = f"--data-dir {folder} --width 2 --epochs 1 --out {tmp_path}"
    main(f"demo --data fashion-mnist {options}".split())
    html = (tmp_path / "report.html").read_text()
    page = json.loads(re.search(r'type="application/json">(.*?)</script>', html)[1])
    assert page["images"]["names"] is None
    assert "scatter" not in page


@pytest.mark.slow
def test_the_same_seed_gives_the_same_scree(folder, tmp_path):
    def losses(seed):
        out = tmp_path / str(seed)
        options = f"--width 3 --epochs 2 --seed {seed} --out {out}"
        main(f"demo --data fashion-mnist --data-dir {folder} {options}".split())
        return json.loads((out / "results.json").read_text())["scree"]["loss"]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@pytest.mark.slow
def test_a_width_above_the_number_of_pixels(folder, tmp_path):
    """PCA has no more than 30 components: from there on it has nothing left to explain."""
    options = f"--data-dir {folder} --width 33 --epochs 1 --out {tmp_path}"
    main(f"demo --data fashion-mnist {options}".split())
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["scree"]["ks"]) == len(results["pca"]) == 34
    assert results["pca"][30:] == pytest.approx([0] * 4, abs=1e-12)


@pytest.mark.slow
def test_fewer_held_out_images_than_are_shown(folder, tmp_path):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images(3))))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:3])))
    main(f"demo --data fashion-mnist --data-dir {folder} --epochs 1 --out {tmp_path}".split())
    assert json.loads((tmp_path / "results.json").read_text())["scree"]["count"] == 3


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "taildropout", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


@pytest.mark.slow
def test_the_digits_as_a_command(tmp_path):
    result = run("demo", "--epochs", "2", "--width", "4", cwd=tmp_path)
    assert result.returncode == 0
    results = json.loads((tmp_path / "taildropout-demo" / "results.json").read_text())
    assert (results["data"], results["epochs"], results["width"]) == ("digits", 2, 4)
    scree = td.Scree.from_dict(results["scree"])
    assert scree.count == 397
    digits = data.load_digits()
    assert results["pca"] == pytest.approx(pca_errors(digits.train, digits.test, [0, 1, 2, 3, 4]))
    assert results["chosen_k"] == scree.choose(TOLERANCE)
    assert results["largest_difference"] < 1e-5
    assert results["reloaded_equal"] is True
    assert "100%" in result.stderr  # the progress bar


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("demo --data nothing", r"invalid choice: '?nothing"),
        ("demo --width 0", "must be at least 1, got 0"),
        ("demo --epochs -2", "must be at least 1, got -2"),
        ("demo --width many", "must be a whole number, got .many."),
        ("", "required: command"),
        ("demo --data fashion-mnist --data-dir missing", "Fashion-MNIST is not in missing"),
        pytest.param(
            "demo --out file --epochs 1 --width 2",
            "taildropout demo: .*'file'",
            marks=pytest.mark.slow,
        ),
        ("demo --epochs 1 --width 2 --seed 99999999999999999999", "seed"),
    ],
)
def test_bad_arguments_end_with_a_message(tmp_path, arguments, words):
    (tmp_path / "file").write_text("in the way")
    result = run(*arguments.split(), cwd=tmp_path)
    assert result.returncode != 0
    assert re.search(words, result.stderr)
    assert "Traceback" not in result.stderr


HELD_OUT_OF_DEDICATED = {1: 0.0397, 2: 0.0268, 4: 0.0185, 8: 0.0140}


@pytest.mark.slow
@pytest.mark.skipif(
    not data.DEBIAN_FOLDER.is_dir(),
    reason="Fashion-MNIST is not here: apt-get install dataset-fashion-mnist",
)
def test_fashion_mnist_beats_pca_at_every_k_and_nears_networks_of_that_width():
    """Against the errors of autoencoders that were each trained for one width alone."""
    torch.manual_seed(0)
    pictures = data.load_fashion_mnist()
    model = Autoencoder(28 * 28, 8)
    train(model, pictures.train, epochs=12)
    batches = [(batch, batch) for batch in pictures.test.split(1000)]
    scree = td.scree(model, torch.nn.MSELoss(), batches, progress=False)
    loss = dict(zip(scree.ks, scree.loss.tolist(), strict=True))
    pca = pca_errors(pictures.train, pictures.test, scree.ks)
    assert all(loss[k] < pca[k] for k in range(1, 9))
    assert all(loss[k] <= 1.25 * dedicated for k, dedicated in HELD_OUT_OF_DEDICATED.items())

import base64
import io
import json
import re
import shutil
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image
from plotly.offline import get_plotlyjs
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout.showing.explore import SHOWN
from taildropout.showing.report import report

HEIGHT, WIDTH, N = 3, 4, 5


def autoencoder():
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(HEIGHT * WIDTH, 7), nn.Tanh(), nn.Linear(7, N))
    return nn.Sequential(encoder, td.TailDropout(), nn.Linear(N, HEIGHT * WIDTH), nn.Sigmoid())


def cut_by_hand(model, inputs, k):
    """What the autoencoder gives at k, without any TailDropout."""
    features = model[0](inputs)
    features[:, k:] = 0
    return model[3](model[2](features))


def classes(count):
    return [["boot", "shirt", "bag"][i % 3] for i in range(count)]


@pytest.fixture
def model():
    return autoencoder()


@pytest.fixture
def inputs():
    return torch.rand(40, HEIGHT * WIDTH, generator=torch.Generator().manual_seed(2))


def measured(model, inputs, target=None, loss=None, **options):
    target = inputs if target is None else target
    loss = nn.MSELoss() if loss is None else loss
    return td.scree(model, loss, [(inputs, target)], progress=False, **options)


def data_of(path):
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    return json.loads(found[1])


def decoded(url):
    prefix = "data:image/png;base64,"
    assert url.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix(prefix)))))


def side_by_side(images, low, high, shape=(HEIGHT, WIDTH)):
    shades = ((images.reshape(-1, *shape) - low) / (high - low)).clamp(0, 1) * 255
    return np.concatenate(list(shades.round().byte().numpy()), axis=1)


# --- what is on the page ------------------------------------------------------------------------


def test_a_scree_alone_gives_the_curve_and_the_choice(tmp_path, model, inputs):
    scree = measured(model, inputs)
    report(None, scree, None, tmp_path / "report.html", tolerance=0.3, title="Mine")
    page = data_of(tmp_path / "report.html")
    losses = torch.stack(
        [(cut_by_hand(model, inputs, k) - inputs).square().mean(1) for k in range(N + 1)]
    ).detach()
    assert page["ks"] == [0, 1, 2, 3, 4, 5]
    assert_close(torch.tensor(page["loss"]), losses.mean(1))
    assert_close(torch.tensor(page["stderr"]), losses.std(1) / 40**0.5)
    assert (page["count"], page["title"], page["layer"]) == (40, "Mine", "1")
    assert page["chosen"] == scree.choose(0.3)
    assert page["explanation"] == scree.explain(0.3)
    assert {"costs", "images", "panels", "scatter"}.isdisjoint(page)


def test_parameters_and_flops_are_those_of_a_network_of_that_width(tmp_path, model, inputs):
    report(model, measured(model, inputs), inputs, tmp_path / "report.html")
    costs = data_of(tmp_path / "report.html")["costs"]
    pixels = HEIGHT * WIDTH
    multiplications = [pixels * 7 + 7 * k + k * pixels for k in range(N + 1)]
    assert costs["parameters"] == [m + 7 + k + pixels for k, m in enumerate(multiplications)]
    assert costs["flops"] == [2 * m for m in multiplications]


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, HEIGHT, WIDTH)])
def test_the_pictures_are_what_the_network_gives_at_each_k(tmp_path, model, inputs, shape):
    inputs = 3 * inputs - 1  # the darkest pixel is black, the brightest white
    scree = measured(model, inputs)
    report(model, scree, inputs, tmp_path / "report.html", image_shape=shape)
    page = data_of(tmp_path / "report.html")["images"]
    low, high = inputs.min(), inputs.max()
    shown = inputs[:SHOWN]
    assert (page["height"], page["width"]) == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(decoded(page["inputs"]), side_by_side(shown, low, high))
    for k in range(N + 1):
        expected = cut_by_hand(model, shown, k).detach()
        np.testing.assert_array_equal(
            decoded(page["outputs"][k]), side_by_side(expected, low, high)
        )
        errors = torch.tensor([image[k] for image in page["errors"]])
        assert_close(errors, (expected - shown).square().mean(1))


def test_images_with_three_channels_are_in_colour(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(18, 2),
        td.TailDropout(),
        nn.Linear(2, 18),
        nn.Unflatten(1, (3, 2, 3)),
    )
    inputs = torch.rand(5, 3, 2, 3)
    report(model, measured(model, inputs), inputs, tmp_path / "report.html")
    page = data_of(tmp_path / "report.html")["images"]
    shades = 255 * (inputs - inputs.min()) / (inputs.max() - inputs.min())
    expected = np.concatenate(list(shades.round().byte().permute(0, 2, 3, 1).numpy()), axis=1)
    np.testing.assert_array_equal(decoded(page["inputs"]), expected)


def moved_by_hand(model, inputs, j):
    """Feature j from its 5th to its 95th percentile, all others at their medians."""
    features = model[0](inputs).detach()
    middle = torch.stack([column.sort().values[(len(column) - 1) // 2] for column in features.T])
    values = np.linspace(*np.percentile(features[:, j].numpy(), [5, 95]), 9)
    rows = middle.repeat(9, 1)
    rows[:, j] = torch.tensor(values)
    return values, nn.Sequential(*model[2:])(rows).detach()


def test_a_panel_moves_one_feature_and_leaves_the_others(tmp_path, model, inputs):
    report(
        model,
        measured(model, inputs),
        inputs,
        tmp_path / "report.html",
        image_shape=(HEIGHT, WIDTH),
    )
    panels = data_of(tmp_path / "report.html")["panels"]
    assert panels["n"] == len(panels["values"]) == len(panels["strips"]) == N
    for j in range(N):
        values, outputs = moved_by_hand(model, inputs, j)
        assert panels["values"][j] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-6)
        expected = side_by_side(outputs, inputs.min(), inputs.max()).astype(int)
        assert abs(decoded(panels["strips"][j]).astype(int) - expected).max() <= 1  # rounding


def test_without_images_a_panel_has_the_outputs_that_change_most(tmp_path, model, inputs):
    report(model, measured(model, inputs), inputs, tmp_path / "report.html")
    panels = data_of(tmp_path / "report.html")["panels"]
    swept = torch.stack([moved_by_hand(model, inputs, j)[1] for j in range(N)])
    change = (swept.amax(1) - swept.amin(1)).amax(0)
    assert panels["outputs"] == sorted(change.argsort(descending=True)[:6].tolist())
    curves = torch.tensor(panels["curves"])  # (feature, output, step)
    assert_close(curves, swept[:, :, panels["outputs"]].transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_first_16_of_many_features_have_a_panel(tmp_path):
    model = nn.Sequential(nn.Linear(4, 20), td.TailDropout(), nn.Linear(20, 3))
    inputs = torch.randn(9, 4)
    scree = measured(
        model, inputs, torch.zeros(9, dtype=torch.long), nn.CrossEntropyLoss(), ks=[20]
    )
    report(model, scree, inputs, tmp_path / "report.html")
    panels = data_of(tmp_path / "report.html")["panels"]
    assert (panels["n"], len(panels["values"]), panels["outputs"]) == (20, 16, [0, 1, 2])


def test_the_scatter_has_every_class_and_its_separation(tmp_path, model, inputs):
    names = classes(40)
    report(
        model,
        measured(model, inputs),
        inputs,
        tmp_path / "report.html",
        labels=names,
        contrast={"footwear": ["boot"], "the rest": ["shirt", "bag"]},
    )
    scatter = data_of(tmp_path / "report.html")["scatter"]
    features = model[0](inputs).detach().numpy()
    assert [group["name"] for group in scatter["groups"]] == ["bag", "boot", "shirt"]
    for group in scatter["groups"]:
        mine = features[[name == group["name"] for name in names]]
        assert group["x"] == pytest.approx(mine[:, 0], rel=1e-3)
        assert group["y"] == pytest.approx(mine[:, 1], rel=1e-3)

    def auc(a, b):
        rows = [name in (*a, *b) for name in names]
        area = roc_auc_score([name in a for name in np.array(names)[rows]], features[rows, 0])
        return max(area, 1 - area)

    assert scatter["contrast"]["auc"] == pytest.approx(auc(["boot"], ["shirt", "bag"]))
    assert scatter["contrast"]["counts"] == [14, 26]
    pairs = [auc([a], [b]) for a, b in [("bag", "boot"), ("bag", "shirt"), ("boot", "shirt")]]
    assert scatter["pairs"] == {"count": 3, "median": pytest.approx(sorted(pairs)[1])}


def test_labels_may_be_a_tensor_of_numbers(tmp_path, model, inputs):
    labels = torch.arange(40) % 2
    contrast = {"even": [0], "odd": [1]}
    scree = measured(model, inputs)
    report(model, scree, inputs, tmp_path / "report.html", labels=labels, contrast=contrast)
    scatter = data_of(tmp_path / "report.html")["scatter"]
    assert [group["name"] for group in scatter["groups"]] == ["0", "1"]
    assert scatter["contrast"]["auc"] == scatter["pairs"]["median"]


# --- models of other kinds ----------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.dropout, self.out_of = nn.Linear(4, 4), td.TailDropout(), nn.Linear(4, 4)

    def forward(self, x):
        return self.out_of(self.dropout(self.into(x))) + x


def test_what_goes_around_the_layer_forbids_panels_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    model, inputs = Residual(), torch.randn(12, 4)
    report(model, measured(model, inputs), inputs, tmp_path / "report.html", labels=classes(12))
    page = data_of(tmp_path / "report.html")
    assert "around the layer" in page["panels"]["why_not"]
    assert len(page["costs"]["parameters"]) == 5
    assert len(page["scatter"]["groups"]) == 3


def test_maps_have_no_single_number_to_move(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), td.TailDropout(dropout_dim=1), nn.Conv2d(3, 1, 3, padding=1)
    )
    inputs = torch.rand(6, 1, 5, 4)
    report(model, measured(model, inputs), inputs, tmp_path / "report.html")
    page = data_of(tmp_path / "report.html")
    assert "maps or sequences" in page["panels"]["why_not"]
    assert len(page["images"]["outputs"]) == 4


class Branching(nn.Sequential):
    """What it does depends on its input: no graph of it can be exported."""

    def forward(self, input):
        return super().forward(input if input.sum() > 0 else -input)


def test_where_the_network_cannot_be_pruned_the_page_says_why(tmp_path):
    torch.manual_seed(0)
    model = Branching(nn.Linear(4, 3), td.TailDropout(), nn.Linear(3, 2))
    inputs = torch.rand(8, 4)
    with pytest.raises(td.PruningError) as refusal:
        td.plan_pruning(model, 1, inputs[:2])
    report(model, measured(model, inputs, torch.zeros(8, 2)), inputs, tmp_path / "report.html")
    page = data_of(tmp_path / "report.html")
    assert page["costs"]["why_not"].partition("\n")[0] == str(refusal.value).partition("\n")[0]
    assert len(page["panels"]["values"]) == 3


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.dropout, self.out_of = nn.Linear(4, 3), td.TailDropout(), nn.Linear(3, 2)

    def forward(self, a, b):
        return self.out_of(self.dropout(self.into(a + b)))


@pytest.mark.parametrize("pack", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": b}])
def test_inputs_may_be_a_tuple_or_a_dict(tmp_path, pack):
    torch.manual_seed(0)
    model, inputs = Pair(), pack(torch.randn(9, 4), torch.randn(9, 4))
    scree = measured(model, inputs, torch.zeros(9, 2))
    report(model, scree, inputs, tmp_path / "report.html")
    page = data_of(tmp_path / "report.html")
    assert page["costs"]["parameters"] == [2, 9, 16, 23]  # 5 k + k + 2 and what comes with it
    assert len(page["panels"]["curves"]) == 3


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    loss = torch.tensor([float("inf"), float("nan"), 1.0], dtype=torch.float64)
    report(
        None,
        td.Scree("1", [0, 1, 2], loss, 1, torch.full((3, 3), torch.nan)),
        None,
        tmp_path / "report.html",
    )
    page = data_of(tmp_path / "report.html")
    assert page["loss"] == [None, None, 1.0]
    assert page["stderr"] == [None, None, None]
    assert page["chosen"] == 2
    assert page["explanation"].startswith("No k is chosen: losses must be finite")


# --- the file and the model -----------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(tmp_path, model, inputs):
    path = tmp_path / "report.html"
    report(model, measured(model, inputs), inputs, path, image_shape=(HEIGHT, WIDTH))
    html = path.read_text()
    assert "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'" in html
    own = html.replace(get_plotlyjs(), "")
    assert len(own) < len(html) / 10
    assert re.findall(r"https?://", own) == []
    assert path.stat().st_size < 8e6


@pytest.mark.slow
def test_the_same_arguments_give_the_same_file(tmp_path, model, inputs):
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        report(
            model,
            measured(model, inputs),
            inputs,
            tmp_path / name,
            labels=classes(40),
            image_shape=(HEIGHT, WIDTH),
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_names_cannot_end_the_script_that_they_are_in(tmp_path, model, inputs):
    nasty = "</script><script>throw 1</script><!--"
    path = tmp_path / "report.html"
    report(model, measured(model, inputs), inputs, path, labels=[nasty] * 40, title=nasty)
    assert nasty not in path.read_text()
    page = data_of(path)
    assert page["title"] == page["scatter"]["groups"][0]["name"] == nasty


def state(model):
    return (
        [module.training for module in model.modules()],
        [layer.k for layer in td.tail_dropouts(model).values()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [p.grad for p in model.parameters()],
        torch.get_rng_state().tolist(),
    )


def test_the_model_comes_back_as_it_was(tmp_path, model, inputs):
    scree = measured(model, inputs)
    model.train()
    model[0].eval()
    model[1].set_k(2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = state(model)
    report(model, scree, inputs, tmp_path / "report.html", labels=classes(40))
    assert state(model) == before
    assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


def test_after_an_error_the_model_and_the_old_file_are_as_they_were(tmp_path, model, inputs):
    path = tmp_path / "report.html"
    path.write_text("old")
    scree = measured(model, inputs)
    model.train()
    before = state(model)
    with pytest.raises(ValueError, match="contrast must be two groups of labels that occur"):
        report(model, scree, inputs, path, labels=classes(40), contrast={"a": ["boot"], "b": ["x"]})
    assert state(model) == before
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_a_page_that_would_be_too_large_is_not_written(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90_000, 1), td.TailDropout(), nn.Linear(1, 90_000))
    inputs = torch.rand(24, 90_000)
    with pytest.raises(ValueError, match=r"must stay below 8 MB, got .*: give fewer or smaller"):
        report(
            model,
            measured(model, inputs),
            inputs,
            tmp_path / "report.html",
            image_shape=(300, 300),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inputs": None}, "model and inputs belong together"),
        ({"model": None}, "model and inputs belong together"),
        ({"model": None, "inputs": None, "labels": [1]}, "labels and image_shape are those of"),
        ({"contrast": {"a": [0], "b": [1]}}, "contrast needs the labels"),
        ({"labels": [1, 2]}, "one for each of the 40 samples of inputs, got 2"),
        ({"image_shape": (5, 5)}, r"image_shape must be .* got \(1, 5, 5\) for inputs of shape"),
        ({"image_shape": (2, 2, 3)}, r"1 or 3 channels"),
        ({"model": nn.Linear(12, 1)}, "model must contain a TailDropout layer"),
        ({"model": nn.Sequential(td.TailDropout())}, r"one of the model's .* \['0'\], got '1'"),
        ({"inputs": torch.zeros(0, 12)}, r"one number of samples, got \[0\]"),
        ({"tolerance": -1}, "tolerance must be at least 0, got -1"),
    ],
)
def test_errors_say_what_is_needed(tmp_path, model, inputs, arguments, words):
    given = {"scree": measured(model, inputs), "model": model, "inputs": inputs} | arguments
    with pytest.raises(ValueError, match=words):
        report(**given, path=tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["plotly.offline", "PIL.Image"])
def test_a_missing_extra_is_named_with_the_command_that_mends_it(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    scree = td.Scree("1", [0, 1], torch.tensor([2.0, 1.0]), 9, torch.eye(2))
    with pytest.raises(ImportError, match=r"pip install 'taildropout\[report\]'"):
        report(None, scree, None, tmp_path / "report.html")


# --- in a browser -----------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="Chromium is not here: apt-get install chromium chromium-driver",
)


def in_chromium(test):
    return pytest.mark.browser(needs_chromium(test))


FLAGS = [
    "--headless=new",
    "--no-sandbox",  # which root can't have
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def chromium():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two reports: with everything, and of a classifier without pictures."""
    folder = tmp_path_factory.mktemp("pages")
    model = autoencoder()
    inputs = torch.rand(40, HEIGHT * WIDTH, generator=torch.Generator().manual_seed(2))
    report(
        model,
        measured(model, inputs),
        inputs,
        folder / "everything.html",
        labels=classes(40),
        contrast={"footwear": ["boot"], "shirts": ["shirt"]},
        image_shape=(HEIGHT, WIDTH),
        tolerance=1e-9,  # starts at n
        title="A <b>title</b>",
    )
    classifier = nn.Sequential(nn.Linear(4, 3), td.TailDropout(), nn.Linear(3, 2))
    targets = torch.arange(20) % 2
    few = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    scree = measured(classifier, few, targets, nn.CrossEntropyLoss())
    report(classifier, scree, few, folder / "classifier.html", labels=targets)
    report(None, scree, None, folder / "scree.html")
    return folder


def opened(chromium, path, *, width=1100, dark=False):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.get_log("browser")
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chromium.get(path.as_uri())
    ready = "return document.body.dataset.ready"
    WebDriverWait(chromium, 60).until(lambda driver: driver.execute_script(ready))
    return chromium


def text(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector).text


def marker(driver, plot="curve"):
    """Where the last trace of a plot, the dot of the k, is: in data, and on the screen."""
    x, y, errors = driver.execute_script(
        f"const t = document.getElementById('{plot}').data.at(-1);"
        "return [t.x[0], t.y[0], t.error_y?.array?.[0]];"
    )
    box = driver.execute_script(
        f"return [...document.querySelectorAll('#{plot} .scatterlayer .trace')].at(-1)"
        ".querySelector('.points path').getBoundingClientRect().toJSON();"
    )
    return x, y, errors, (box["left"] + box["width"] / 2, box["top"] + box["height"] / 2)


def shown_picture(driver, i):
    """The grey levels of the i-th reconstruction as it is drawn."""
    url = driver.execute_script(
        "const picture = document.querySelectorAll('.picture')[arguments[0]];"
        "return picture.querySelectorAll('canvas')[1].toDataURL();",
        i,
    )
    return decoded(url)[:, :, 0]


@in_chromium
def test_the_arrow_keys_move_k_and_all_that_follows_it(chromium, pages):
    page = data_of(pages / "everything.html")
    driver = opened(chromium, pages / "everything.html")
    slider = driver.find_element(By.ID, "k")
    assert slider.accessible_name.startswith("Features kept")
    at = len(page["ks"]) - 1
    places = []
    slider.send_keys("")
    for key, step in [
        (None, 0),
        (Keys.ARROW_LEFT, -1),
        (Keys.ARROW_LEFT, -1),
        (Keys.ARROW_RIGHT, 1),
    ]:
        slider.send_keys(key or "")
        at += step
        k = page["ks"][at]
        assert text(driver, "#k-text") == f"k = {k} of {N}"
        assert slider.get_attribute("aria-valuetext") == f"{k} of {N}"
        assert text(driver, "#parameters").startswith(str(page["costs"]["parameters"][at]))
        assert text(driver, "#flops").startswith(f"{page['costs']['flops'][at]:.0f}")
        assert text(driver, "#loss").startswith(f"{page['loss'][at]:#.3g} ± ")
        x, y, error, place = marker(driver)
        assert (x, y, error) == (k, page["loss"][at], page["stderr"][at])
        places.append(place)
        for i in (0, 7):
            expected = decoded(page["images"]["outputs"][at])[:, i * WIDTH : (i + 1) * WIDTH]
            np.testing.assert_array_equal(shown_picture(driver, i), expected)
        pale = driver.find_elements(By.CSS_SELECTOR, "#features figure.tail")
        assert len(pale) == N - k
    left = [place[0] for place in places]
    assert left[0] > left[1] > left[2]
    assert left[3] == pytest.approx(left[1])
    slider.send_keys(Keys.HOME)
    assert text(driver, "#k-text") == f"k = 0 of {N}"
    assert driver.get_log("browser") == []


@in_chromium
def test_a_click_on_an_image_shows_its_own_error(chromium, pages):
    page = data_of(pages / "everything.html")
    driver = opened(chromium, pages / "everything.html")
    buttons = driver.find_elements(By.CSS_SELECTOR, ".picture")
    assert len(buttons) == SHOWN
    curve = "return document.getElementById('image-curve').data[0].y"
    assert driver.execute_script(curve) == page["images"]["errors"][0]
    buttons[4].click()
    assert driver.execute_script(curve) == page["images"]["errors"][4]
    assert text(driver, "#about-image") == "Error of shirt (image 5)"
    buttons[5].send_keys(Keys.ENTER)
    assert driver.execute_script(curve) == page["images"]["errors"][5]
    assert [b.get_attribute("aria-pressed") for b in buttons].index("true") == 5
    x, y, _, _ = marker(driver, "image-curve")
    assert (x, y) == (N, page["images"]["errors"][5][N])
    assert buttons[5].text.splitlines()[1] == f"error {page['images']['errors'][5][N]:#.3g}"


@in_chromium
def test_a_click_on_the_curve_moves_the_slider(chromium, pages):
    driver = opened(chromium, pages / "everything.html")
    x, y = driver.execute_script(
        "const points = document.querySelectorAll('#curve .scatterlayer .trace')[2]"
        ".querySelectorAll('.points path'); points[0].scrollIntoView({block: 'center'});"
        "const b = points[2].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];"
    )
    mouse = webdriver.ActionChains(driver)
    mouse.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    mouse.w3c_actions.pointer_action.click()
    mouse.perform()
    WebDriverWait(driver, 10).until(lambda driver: text(driver, "#k-text") == f"k = 2 of {N}")
    assert driver.find_element(By.ID, "k").get_attribute("value") == "2"


@in_chromium
def test_pointing_shows_values(chromium, pages):
    page = data_of(pages / "everything.html")
    driver = opened(chromium, pages / "everything.html")
    strip = driver.find_element(By.CSS_SELECTOR, "#features figure canvas")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", strip)
    webdriver.ActionChains(driver).move_to_element(strip).perform()
    middle = page["panels"]["values"][0][4]
    readout = text(driver, "#features figure figcaption span")
    assert float(readout.replace("\N{MINUS SIGN}", "-")) == pytest.approx(middle, rel=1e-2)
    picture = driver.find_element(By.CSS_SELECTOR, ".picture")
    assert picture.get_attribute("title") == (
        f"boot (image 1): error {page['images']['errors'][0][N]:#.3g} from the first {N} features"
    )


@in_chromium
def test_the_scatter_and_its_number_are_there(chromium, pages):
    page = data_of(pages / "everything.html")
    driver = opened(chromium, pages / "everything.html")
    names = driver.execute_script("return document.getElementById('points').data.map(t => t.name)")
    assert names == ["bag", "boot", "shirt"]
    assert text(driver, "#auc") == f"{page['scatter']['contrast']['auc']:.3f}"
    assert "3 pairs of classes" in text(driver, "#pairs")
    assert text(driver, "h1") == "A <b>title</b>"


@in_chromium
@pytest.mark.parametrize("name", ["everything", "classifier", "scree"])
@pytest.mark.parametrize("width", [1100, 360])
def test_nothing_sticks_out_and_the_console_is_empty(chromium, pages, name, width):
    driver = opened(chromium, pages / f"{name}.html", width=width)
    inside, whole = driver.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollWidth]"
    )
    assert whole <= inside
    wide = driver.execute_script(
        "return [...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(wide) <= inside
    loads = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert all(name.startswith("data:") for name in driver.execute_script(loads))
    assert driver.get_log("browser") == []


@in_chromium
def test_sections_without_anything_to_show_are_hidden(chromium, pages):
    def sections(name):
        driver = opened(chromium, pages / f"{name}.html")
        headings = driver.find_elements(By.TAG_NAME, "h2")
        return [heading.text for heading in headings if heading.is_displayed()]

    curve, panels, scatter = (
        "Loss at every width",
        "One feature at a time",
        "The first two features",
    )
    assert sections("scree") == [curve]
    assert not chromium.find_element(By.ID, "parameters").is_displayed()
    assert sections("classifier") == [curve, panels, scatter]
    assert sections("everything") == [curve, f"From the first {N} features", panels, scatter]


def brightness(colour):
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@in_chromium
def test_dark_mode_is_dark_in_the_plots_too(chromium, pages):
    def colours(driver):
        return driver.execute_script(
            "const ink = e => getComputedStyle(e);"
            "return [ink(document.body).backgroundColor, ink(document.querySelector('h2')).color,"
            " ink(document.querySelector('#curve .xtick text')).fill,"
            " ink(document.querySelector('#points .legendtext')).fill]"
        )

    driver = opened(chromium, pages / "everything.html", dark=True)
    page, *texts = map(brightness, colours(driver))
    assert page < 60
    assert min(texts) > 180
    light = {"name": "prefers-color-scheme", "value": "light"}  # changes while it is open
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [light]})
    WebDriverWait(driver, 10).until(lambda driver: brightness(colours(driver)[2]) < 100)
    page, *texts = map(brightness, colours(driver))
    assert page > 200
    assert max(texts) < 100


@in_chromium
def test_focus_can_be_seen(chromium, pages):
    driver = opened(chromium, pages / "everything.html")
    driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    focused = driver.switch_to.active_element
    assert focused.get_attribute("id") == "k"
    assert focused.value_of_css_property("outline-style") == "solid"
    assert focused.value_of_css_property("outline-width") == "3px"

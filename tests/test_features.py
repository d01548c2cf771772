"""The extractors: the shipped classifier, Inception from either of its two files, DINOv2."""

import importlib.util
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from evaluation import features, inception
from system.files import sha256_of
from tests.made_inception import made_state, noise, write_made_weights

ROOT = features.ASSETS.parent


@pytest.fixture(scope="module")
def classifier():
    return features.load_extractor("mnist")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return write_made_weights(tmp_path_factory.mktemp("inception"))


def test_classifier_reads_digits_it_has_not_seen(classifier, digits):
    images, labels = features.real_images("mnist", "val", digits)
    assert len(images) == 500 and (labels.bincount() == 50).all()
    out = classifier(images)
    assert (out.logits.argmax(1) == labels).float().mean() >= 0.97
    assert out.pool.shape == (500, classifier.num_features) and out.spatial is None


def test_classifier_is_small_and_reads_the_mean_over_channels(classifier, digits):
    assert sum(p.numel() for p in classifier.net.parameters()) <= 150_000
    assert features.CLASSIFIERS["mnist"].stat().st_size < 700_000
    images = features.real_images("mnist", "val", digits)[0][:8]
    swapped = images.clone()
    swapped[:, 0], swapped[:, 2] = images[:, 0] // 2, images[:, 2] // 2
    grey = images[:, 1].float() / 3 + 2 * (images[:, 1] // 2).float() / 3
    by_hand = classifier.net.trunk((grey / 127.5 - 1).unsqueeze(1))
    torch.testing.assert_close(classifier(swapped).pool, by_hand)


def test_classifier_refuses_other_sizes(classifier):
    with pytest.raises(ValueError, match="32x32 pixels.*28x28"):
        classifier(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_training_script_learns_in_two_epochs(digits, monkeypatch):
    path = ROOT / "scripts" / "train_classifier.py"
    spec = importlib.util.spec_from_file_location("train_classifier", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setitem(script.EPOCHS, "mnist", 2)
    net = script.train("mnist", *(tensor[::2] for tensor in features.real_images("mnist", "train", digits)))
    images, labels = features.real_images("mnist", "val", digits)
    with torch.no_grad():
        assert (net(images).logits.argmax(1) == labels).float().mean() > 0.8


def test_unknown_extractor_and_weights_of_another_network(tmp_path):
    with pytest.raises(ValueError, match="extractor=vgg; needed"):
        features.load_extractor("vgg")
    save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="another model"):
        features.load_extractor("mnist", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="sha256 .*; needed: abc"):
        features.load_extractor("mnist", sha256="abc")


# ---- Inception: random numbers in the right layout stand in for the weights, which cannot be fetched in a test.


def test_inception_features(inception_file):
    extractor = features.load_extractor("inception", *inception_file)
    seen = []
    extractor.net.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = extractor(noise(2))
    assert out.pool.shape == (2, 2048) and out.logits.shape == (2, 1008) and out.spatial.shape == (2, 2023)
    as_tensorflow = out.spatial.view(2, 17, 17, 7)  # NHWC, as ADM's mu_s and sigma_s
    torch.testing.assert_close(as_tensorflow[1, 3, 5], seen[0][1, :7, 3, 5])
    torch.testing.assert_close(out.logits, out.pool @ extractor.net.net.fc.weight.T)  # without bias, as ADM's score


def test_inception_from_torchscript_is_the_same_network(inception_file, tmp_path):
    names = inception.convolutions(made_state())
    assert names["layers.mixed_8.tower_1.conv_3"] == "Mixed_7a.branch7x7x3_4" and len(names) == 94
    assert names["layers.mixed_10.tower_1_mixed_conv_1"] == "Mixed_7c.branch3x3dbl_3b"
    root = torch.nn.Module()
    for name, own in names.items():
        tensors = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
        for leaf, key in tensors.items():
            put(root, f"{name}.{leaf}", made_state()[f"{own}.{key}"])
    put(root, "output.weight", made_state()["fc.weight"])
    put(root, "output.bias", made_state()["fc.bias"])
    path = tmp_path / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), path)
    theirs = features.load_extractor("inception", path, sha256_of(path))
    ours = features.load_extractor("inception", *inception_file)
    torch.testing.assert_close(theirs(noise(1)).pool, ours(noise(1)).pool, rtol=0, atol=0)


def put(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    root.register_buffer(leaf, tensor.clone())


def test_inception_file_is_known_by_its_hash(inception_file):
    with pytest.raises(ValueError, match=f"needed: {inception.STATE_DICT}"):
        features.load_extractor("inception", inception_file[0])


def test_inception_of_another_network_is_refused(tmp_path):
    for content in ({"conv.weight": torch.zeros(3)}, [1, 2], {}):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match="not Inception's weights") as error:
            features.load_extractor("inception", path, sha256_of(path))
        assert "\n" not in str(error.value)


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_runs(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": Canary(canary)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "empty.pth").touch()
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("a/code/__torch__.py", "")
        archive.writestr("a/data.pkl", pickle.dumps(Canary(canary)))
        archive.writestr("a/version", "3")
    for path in tmp_path.glob("*.p*"):
        with pytest.raises(ValueError):
            features.load_extractor("inception", path, sha256_of(path))
        assert not canary.exists()


def test_missing_inception_says_which_file_goes_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="put https://.*6726825d.pth at .*checkpoints.*extractor_weights=") as error:
        features.load_extractor("inception")
    assert "\n" not in str(error.value)


def test_dinov2_is_the_class_token_of_the_resized_picture(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")

    monkeypatch.setattr(features, "DINOV2", "vit_tiny_patch16_224")  # small, with a class token too
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    extractor = features.load_extractor("dinov2", tmp_path / "model.safetensors")
    grey = torch.full((2, 3, 50, 50), 128, dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((128 / 255 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(extractor(grey).pool[:1], net.forward_features(pixels)[:, 0], atol=1e-4, rtol=1e-4)
    assert extractor(noise(1)).pool.shape == (1, extractor.num_features)


def test_missing_dinov2_says_what_to_give():
    with pytest.raises(ValueError, match="extractor_weights="):
        features.load_extractor("dinov2")

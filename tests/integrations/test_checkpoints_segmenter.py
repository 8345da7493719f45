"""The authors' checkpoints: the same outputs as a plain implementation of the paper that knows their names only."""

import os

import pytest
import torch
import yaml
from torch.nn.functional import gelu, interpolate, layer_norm, pad

from fastmask.integrations.checkpoints import from_original_segmenter, save_original_segmenter
from fastmask.models import Segmenter, SegmenterConfig

PATCH, DIM, HEADS, LAYERS, CLASSES = 4, 64, 2, 2, 5
GRID = (5, 6)
DECODER_LAYERS = 2
# As the authors' training writes it, tuples and all; decoder is filled in.
VARIANT = """
algorithm_kwargs: {{batch_size: 8, num_epochs: 64}}
amp: false
dataset_kwargs: {{dataset: ade20k, normalization: {normalization}}}
inference_kwargs:
  im_size: 24
  window_size: 20
  window_stride: 16
net_kwargs:
  backbone: vit_custom
  d_model: 64
  decoder: {decoder}
  distilled: {distilled}
  drop_path_rate: 0.1
  dropout: 0.0
  image_size: !!python/tuple
  - 20
  - 24
  n_cls: 5
  n_heads: 2
  n_layers: 2
  normalization: {normalization}
  patch_size: 4
"""
MASK = "{drop_path_rate: 0.0, dropout: 0.1, n_cls: 5, n_layers: 2, name: mask_transformer}"
LINEAR = "{n_cls: 5, name: linear}"


def block_shapes(prefix):
    shapes = {"norm1": (DIM,), "norm2": (DIM,), "attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM)}
    shapes |= {"mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def random_weights(decoder, distilled, generator):
    """Weights under the authors' names."""
    extra = 2 if distilled else 1
    modules = {"encoder.patch_embed.proj": (DIM, 3, PATCH, PATCH), "encoder.norm": (DIM,), "encoder.head": (1000, DIM)}
    shapes = {"encoder.cls_token": (1, 1, DIM), "encoder.pos_embed": (1, extra + GRID[0] * GRID[1], DIM)}
    if distilled:
        shapes["encoder.dist_token"] = (1, 1, DIM)
        modules["encoder.head_dist"] = (1000, DIM)
    for i in range(LAYERS):
        modules |= block_shapes(f"encoder.blocks.{i}")
    if decoder == MASK:
        for i in range(DECODER_LAYERS):
            modules |= block_shapes(f"decoder.blocks.{i}")
        modules |= {"decoder.proj_dec": (DIM, DIM), "decoder.decoder_norm": (DIM,), "decoder.mask_norm": (CLASSES,)}
        shapes |= {"decoder.cls_emb": (1, CLASSES, DIM)}
        shapes |= {"decoder.proj_patch": (DIM, DIM), "decoder.proj_classes": (DIM, DIM)}
    else:
        modules["decoder.head"] = (CLASSES, DIM)
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
        # What tells patches apart is made strong, for the classes to differ from patch to patch.
        if name in ("encoder.pos_embed", "encoder.patch_embed.proj.weight"):
            weights[name] *= 5
    return weights


class Plain:
    """The network by its equations, in float64: a dictionary of weights and what is done with them."""

    def __init__(self, weights, distilled):
        self.weights = {name: value.double() for name, value in weights.items()}
        self.extra = 2 if distilled else 1

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def block(self, name, x, heads):
        query, key, value = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x)).chunk(3, -1)
        mixed = []
        for head in range(heads):
            channels = slice(head * DIM // heads, (head + 1) * DIM // heads)
            scores = query[..., channels] @ key[..., channels].mT / (DIM // heads) ** 0.5
            mixed.append(scores.softmax(-1) @ value[..., channels])
        x = x + self.linear(f"{name}.attn.proj", torch.cat(mixed, -1))
        hidden = gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def positions(self, rows, columns):
        table = self.weights["encoder.pos_embed"]
        planes = table[0, self.extra :].reshape(*GRID, DIM).permute(2, 0, 1)[None]
        planes = interpolate(planes, size=(rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([table[:, : self.extra], planes[0].permute(1, 2, 0).reshape(1, rows * columns, DIM)], 1)

    def patch_logits(self, pixels):
        """``(K, h, w)`` of one normalized image whose sides are multiples of the patch size."""
        rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        kernel = self.weights["encoder.patch_embed.proj.weight"].flatten(1)
        patches = [
            kernel @ pixels[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].flatten()
            for i in range(rows)
            for j in range(columns)
        ]
        tokens = torch.stack(patches)[None] + self.weights["encoder.patch_embed.proj.bias"]
        extra = [self.weights[f"encoder.{kind}_token"] for kind in ("cls", "dist")[: self.extra]]
        tokens = torch.cat([*extra, tokens], 1) + self.positions(rows, columns)
        for i in range(LAYERS):
            tokens = self.block(f"encoder.blocks.{i}", tokens, HEADS)
        patches = self.norm("encoder.norm", tokens)[:, self.extra :]
        logits = self.linear("decoder.head", patches) if "decoder.head.weight" in self.weights else self.masks(patches)
        return logits[0].T.reshape(CLASSES, rows, columns)

    def masks(self, patches):
        tokens = torch.cat([self.linear("decoder.proj_dec", patches), self.weights["decoder.cls_emb"]], 1)
        for i in range(DECODER_LAYERS):
            tokens = self.block(f"decoder.blocks.{i}", tokens, DIM // 64)
        tokens = self.norm("decoder.decoder_norm", tokens)
        patches = tokens[:, :-CLASSES] @ self.weights["decoder.proj_patch"]
        classes = tokens[:, -CLASSES:] @ self.weights["decoder.proj_classes"]
        patches = patches / (patches**2).sum(-1, keepdim=True).sqrt()
        classes = classes / (classes**2).sum(-1, keepdim=True).sqrt()
        return self.norm("decoder.mask_norm", patches @ classes.mT)

    def __call__(self, pixels):
        """``(K, H, W)`` of one normalized image of any size."""
        height, width = pixels.shape[1:]
        padded = pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
        logits = self.patch_logits(padded)[None]
        logits = interpolate(logits, size=padded.shape[1:], mode="bilinear", align_corners=False)
        return logits[0, :, :height, :width]


@pytest.fixture
def origin(tmp_path, generator):
    """Writes a checkpoint as the authors' training does."""

    def write(decoder=MASK, distilled=False, normalization="vit", **changes):
        weights = random_weights(decoder, distilled, generator)
        for name, value in changes.pop("weights", {}).items():
            weights.pop(name, None) if value is None else weights.update({name: value})
        optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.001, "params": [0]}]}
        snapshot = {"model": weights, "optimizer": optimizer, "n_cls": CLASSES, "lr_scheduler": {}, "epoch": 63}
        torch.save({**snapshot, **changes}, tmp_path / "checkpoint.pth")
        text = VARIANT.format(decoder=decoder, distilled=str(distilled).lower(), normalization=normalization)
        (tmp_path / "variant.yml").write_text(text)
        return weights

    write.folder = tmp_path
    return write


FORMS = [(MASK, False, "vit"), (LINEAR, False, "vit"), (MASK, True, "deit"), (LINEAR, True, "deit")]


@pytest.mark.parametrize(("decoder", "distilled", "normalization"), FORMS)
@pytest.mark.parametrize("size", [(20, 24), (28, 16), (17, 33)])
def test_outputs_equal_a_plain_implementation(origin, generator, decoder, distilled, normalization, size):
    plain = Plain(origin(decoder, distilled, normalization), distilled)
    model = from_original_segmenter(origin.folder).eval()
    image = torch.rand(3, *size, generator=generator)
    mean, std = {
        "vit": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        "deit": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }[normalization]
    pixels = (image.double() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = plain(pixels).softmax(0)
    scores = model.predict(image[None], window=0, output="scores")[0]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    exact = model.double().predict(image[None].double(), window=0, output="scores")[0]
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=1e-7)
    assert expected.std((1, 2)).mean() > 0.01


def test_windows_equal_a_plain_implementation(origin, generator):
    plain = Plain(origin(), False)
    model = from_original_segmenter(origin.folder).double()
    image = torch.rand(3, 37, 30, generator=generator).double()
    total, count = torch.zeros(CLASSES, 37, 30).double(), torch.zeros(37, 30)
    for top in (0, 16, 17):
        for left in (0, 10):
            rows, columns = slice(top, top + 20), slice(left, left + 20)
            total[:, rows, columns] += plain(2 * image[:, rows, columns] - 1)
            count[rows, columns] += 1
    expected = interpolate((total / count)[None], size=(50, 40), mode="bilinear")[0]
    torch.testing.assert_close(model.predict(image[None], (50, 40), output="scores")[0], expected.softmax(0))


def test_the_configuration_is_that_of_the_file(origin):
    origin(distilled=True, normalization="deit")
    model = from_original_segmenter(origin.folder / "checkpoint.pth")
    assert model.training
    assert model.config == SegmenterConfig(
        5,
        image_size=(20, 24),
        patch_size=4,
        hidden_dim=64,
        encoder_layers=2,
        num_heads=2,
        feedforward_dim=256,
        distilled=True,
        decoder_heads=1,
        window_size=20,
        window_stride=16,
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
    )


@pytest.mark.parametrize(("decoder", "distilled", "normalization"), FORMS)
def test_what_is_written_back_is_what_was_read(origin, tmp_path, decoder, distilled, normalization):
    weights = origin(decoder, distilled, normalization)
    model = from_original_segmenter(origin.folder)
    save_original_segmenter(model, tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == ["checkpoint.pth", "variant.yml"]
    back = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)["model"]
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        if name.startswith("encoder.head"):
            assert back[name].shape == value.shape and not back[name].any()
        else:
            assert torch.equal(back[name], value), name
    # A plain YAML reader suffices, and says what the authors' code asks for.
    net = yaml.safe_load((tmp_path / "back" / "variant.yml").read_text())["net_kwargs"]
    assert set(net) == set(
        yaml.safe_load(VARIANT.format(decoder=1, distilled=1, normalization=1).replace("!!python/tuple", ""))[
            "net_kwargs"
        ]
    )
    again = from_original_segmenter(tmp_path / "back")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_any_model_of_theirs_can_be_written(tmp_path):
    config = SegmenterConfig.preset("seg-tiny-mask-16", 3, encoder_layers=1, image_size=(32, 32), window_size=0)
    model = Segmenter(config)
    save_original_segmenter(model, tmp_path)
    net = yaml.safe_load((tmp_path / "variant.yml").read_text())["net_kwargs"]
    assert net["backbone"] == "vit_tiny_patch16_384" and net["image_size"] == [32, 32]
    assert from_original_segmenter(tmp_path).config == config.replace(window_size=32, window_stride=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedforward_dim": 100}, "feedforward_dim is 100; the authors' code builds 384 only"),
        ({"feedforward_dim": 384}, "decoder_heads is 4; the authors' code builds 1 only"),
        ({"feedforward_dim": 384, "decoder_heads": 1, "pixel_mean": (0.4, 0.5, 0.5)}, "pixel_mean and pixel_std are"),
    ],
)
def test_models_that_are_not_theirs_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_original_segmenter(Segmenter(SegmenterConfig.preset("tiny", 3, **changes)), tmp_path)
    assert not os.listdir(tmp_path)


def test_wrong_keys_and_shapes_are_listed(origin):
    origin(weights={"encoder.norm.bias": None, "decoder.extra": torch.zeros(1), "encoder.head.extra": torch.zeros(1)})
    message = "missing keys: encoder.norm.bias; unexpected keys: decoder.extra, encoder.head.extra"
    with pytest.raises(ValueError, match=message):
        from_original_segmenter(origin.folder)
    origin(weights={"decoder.cls_emb": torch.zeros(1, 6, DIM)})
    with pytest.raises(ValueError, match=r"decoder.cls_emb of shape \(1, 6, 64\) for \(1, 5, 64\)"):
        from_original_segmenter(origin.folder)
    origin(weights={"encoder.head.weight": None, "encoder.head.bias": None})
    from_original_segmenter(origin.folder)


def test_another_number_of_classes_is_refused_unless_asked_for(origin):
    weights = origin()
    with pytest.raises(ValueError, match=r"decoder.cls_emb of shape \(1, 5, 64\) for \(1, 7, 64\)"):
        from_original_segmenter(origin.folder, num_classes=7)
    with pytest.warns(UserWarning, match="decoder.cls_emb, decoder.mask_norm.weight, decoder.mask_norm.bias"):
        model = from_original_segmenter(origin.folder, num_classes=7, ignore_mismatched_sizes=True)
    assert model(torch.rand(1, 3, 20, 24))["logits"].shape == (1, 7, 5, 6)
    assert torch.equal(model.encoder.pos_embed, weights["encoder.pos_embed"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  patch_size: 4\n", "", "net_kwargs has missing keys: patch_size"),
        ("  patch_size: 4\n", "  patch_size: 4\n  depth: 3\n", "net_kwargs has unexpected keys: depth"),
        ("n_layers: 2, name", "layers: 2, name", "decoder has missing keys: n_layers; unexpected keys: layers"),
        ("mask_transformer", "deeplab_dec", "decoder is 'deeplab_dec'; known are mask_transformer and linear"),
        ("name: mask_transformer", "kind: 1", "net_kwargs.decoder has no name"),
        (
            "  normalization: vit\n  patch",
            "  normalization: clip\n  patch",
            "normalization is 'clip'; known are vit, deit",
        ),
        ("net_kwargs", "kwargs", "no net_kwargs"),
        ("d_model: 64", "d_model: x", "hidden_dim|d_model|operand|integer"),
        ("n_heads: 2", "n_heads: 3", "hidden_dim is 64; expected a multiple of num_heads 3"),
        ("!!python/tuple", "!!python/object/apply:os.getcwd", "not a YAML file of plain values"),
        ("amp: false", "amp: [", "not a YAML file of plain values"),
    ],
)
def test_a_wrong_variant_is_named(origin, old, new, message):
    origin()
    path = origin.folder / "variant.yml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=f"{path}.*({message})"):
        from_original_segmenter(origin.folder)


class Evil:
    def __reduce__(self):
        return os.getcwd, ()


def test_nothing_but_tensors_and_plain_values_is_unpickled(origin):
    origin(epoch=Evil())
    with pytest.raises(ValueError, match="(?s)checkpoint.pth could not be read as weights: .*posix.getcwd"):
        from_original_segmenter(origin.folder)


@pytest.mark.parametrize("length", [0, 10, 1000, -10])
def test_a_truncated_checkpoint_is_named(origin, length):
    origin()
    path = origin.folder / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{path} could not be read as weights"):
        from_original_segmenter(origin.folder)


def test_missing_files_and_state_dicts_are_named(origin):
    origin(model=[1])
    with pytest.raises(ValueError, match="holds model of type list; expected an array"):
        from_original_segmenter(origin.folder)
    (origin.folder / "checkpoint.pth").unlink()
    with pytest.raises(FileNotFoundError, match="no weights at .*checkpoint.pth"):
        from_original_segmenter(origin.folder)
    (origin.folder / "variant.yml").unlink()
    with pytest.raises(FileNotFoundError, match="no .*variant.yml"):
        from_original_segmenter(origin.folder)

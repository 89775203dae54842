"""Augmentation as in the released code of DDS: its operations against
PIL, its probabilities, its grey; and images grouped by operation."""
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from datasel_wb.core import seeded
from datasel_wb.datasets import DataRecipe, load_data, make_augment
from datasel_wb.images import (
    DDS_OPS, GEOMETRIC, OPS, STYLES, Augment, cutout, flip_crop, magnitude_levels, randaugment, warp)

GREY = (128, 128, 128)


@pytest.fixture(scope="module")
def photos():
    "48 images of 32 x 32 pixels: cut out of a photograph, and noise with every grey level."
    china = TF.resize(torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[:, 60:380, 100:580], [128, 192],
                      antialias=True)
    real = china.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(24, 3, 32, 32)
    noise = torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "noise"))
    return torch.cat([real, noise])


def affine(p, *matrix): return p.transform(p.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)


def by_pil(name, p, s):
    "An operation of the released code at magnitude 17 on 32 x 32 pixels, in PIL's words; s: 1 or -1."
    if name in ("Color", "Contrast", "Brightness", "Sharpness"): return getattr(ImageEnhance, name)(p).enhance(3.16)
    return {"AutoContrast": lambda: ImageOps.autocontrast(p), "Equalize": lambda: ImageOps.equalize(p),
            "Invert": lambda: ImageOps.invert(p), "Rotate": lambda: p.rotate(51 * s, fillcolor=GREY),
            "Posterize": lambda: ImageOps.posterize(p, 6), "Solarize": lambda: ImageOps.solarize(p, 179),
            "ShearX": lambda: affine(p, 1, 0.51 * s, 0, 0, 1, 0), "ShearY": lambda: affine(p, 1, 0, 0, 0.51 * s, 1, 0),
            "TranslateX": lambda: affine(p, 1, 0, -6.8 * s, 0, 1, 0),
            "TranslateY": lambda: affine(p, 1, 0, 0, 0, 1, -6.8 * s)}[name]()


@pytest.mark.parametrize("name", DDS_OPS[:-1])
@pytest.mark.parametrize("grouped", [True, False])
def test_an_operation_of_dds_equals_pil(photos, name, grouped):
    "Within one grey level; what moves pixels, exactly."
    for sign in (0, 1):
        ours = randaugment(photos, torch.full((48,), DDS_OPS.index(name)), torch.full((48,), sign), 17, "dds", 128,
                           torch.zeros(2, 48), grouped)
        judge = torch.stack([TF.pil_to_tensor(by_pil(name, TF.to_pil_image(p), 1 - 2 * sign)) for p in photos])
        gap = (ours.int() - judge.int()).abs()
        assert ours.dtype == torch.uint8 and gap.max() <= (0 if name in GEOMETRIC else 1)
        assert not torch.equal(ours, photos)


def test_cutout_of_dds_is_a_grey_square_of_12_pixels(photos):
    u = torch.rand(2, 48, generator=seeded(0, "centre"))
    for grouped in (True, False):
        ours = randaugment(photos, torch.full((48,), 14), torch.zeros(48).long(), 17, "dds", 128, u, grouped)
        for image, out, (v, w) in zip(photos, ours, (u * 32).int().T.tolist()):
            p = TF.to_pil_image(image)
            ImageDraw.Draw(p).rectangle([w - 6, v - 6, w + 5, v + 5], fill=GREY)
            assert torch.equal(out, TF.pil_to_tensor(p))


def test_the_published_scale():
    "Of differentiable_data_selection/augment.py and data_utils.py: full strength at 10, constants of a side of 32."
    for m in range(31):
        v, back = (magnitude_levels(m, "dds", 32, 32, s) for s in (1, -1))
        assert v.turn == pytest.approx(3 * m) == pytest.approx(-back.turn)
        assert v.shear == pytest.approx(0.03 * m) == pytest.approx(-back.shear)
        assert v.enhance == pytest.approx(0.18 * m + 0.1) == pytest.approx(back.enhance)
        assert v.right == v.down == round(0.4 * m) == -back.right and v.side == 2 * int(m / 10 * 4 + 1e-9)
        assert v.solarize == int(m / 10 * 256 + 1e-9) % 256 and v.step == 2 ** (8 - min(max(int(m / 10 * 4), 1), 8))
    assert tuple(magnitude_levels(17, "dds", 32, 32)) == pytest.approx((0.51, 51, 7, 7, 3.16, 4, 179, 12))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 31, 27), (3, 2, 2)])
def test_grouped_by_operation_is_the_same_to_the_last_bit(style, shape):
    g, n = seeded(0, f"{style}/{shape}"), len(STYLES[style])
    for low, high, magnitude in ((0, 256, 17), (40, 90, 9), (7, 8, 30), (0, 256, 1)):
        x = torch.randint(low, high, (200, *shape), dtype=torch.uint8, generator=g)
        op, sign = torch.randint(n + 1, (200,), generator=g), torch.randint(2, (200,), generator=g)
        u = torch.rand(2, 200, generator=g)
        one, all_ = (randaugment(x, op, sign, magnitude, style, 128, u, grouped) for grouped in (True, False))
        assert torch.equal(one, all_) and torch.equal(one[op == n], x[op == n])
        few = randaugment(x[:3], op[:3], sign[:3], magnitude, style, 128, u[:, :3])
        assert torch.equal(few, one[:3])


def test_an_empty_batch_and_a_centre_that_nobody_gave(photos):
    none = torch.zeros(0, dtype=torch.int64)
    for style in STYLES: assert randaugment(photos[:0], none, none, 17, style).shape == (0, 3, 32, 32)
    op, sign = torch.full((48,), 14), torch.zeros(48).long()
    for grouped in (True, False):
        out = randaugment(photos, op, sign, 17, "dds", 128, grouped=grouped)
        assert torch.equal(out, cutout(photos, torch.full((2, 48), 0.5), 12, 128))


def test_grouped_computes_only_what_was_drawn(photos, monkeypatch):
    "Equalize is never called for a batch without it; every operation on every image calls it."
    calls = []
    monkeypatch.setattr("datasel_wb.images._equalize", lambda x: calls.append(len(x)) or torch.zeros(len(x), 3, 256))
    op, sign = torch.tensor([OPS.index("Rotate"), OPS.index("Equalize")] * 24), torch.zeros(48).long()
    randaugment(photos, torch.full((48,), OPS.index("Color")), sign, 9)
    assert calls == []
    for grouped in (True, False): randaugment(photos, op, sign, 9, grouped=grouped)
    assert calls == [24, 48]


# ---- probabilities

@pytest.fixture(scope="module")
def drawn():
    "Numbers for 20,000 images, and images that every operation changes."
    x = torch.randint(30, 220, (20_000, 3, 20, 20), dtype=torch.uint8, generator=seeded(0, "noise"))
    return x, Augment(randaugment_style="dds").draw(20_000, seeded(0, "u"))


def changed(x, u):
    out = Augment(randaugment=17, randaugment_style="dds", fill=128).apply(x, u)
    return ((out * 255).round() != x).flatten(1).any(1)


def test_an_operation_is_applied_with_the_probability_of_its_image(drawn):
    x, u = drawn
    for layer in (10, 11):
        alone = u.clone()
        alone[21 - layer] = 1   # the other layer never
        share = changed(x, alone).float()
        for k in range(6):
            mine = ((u[9] * 6).long() == k)
            p = 0.2 + 0.6 * (k + 0.5) / 6
            assert (share[mine].mean() - p).abs() < 5 * (p * (1 - p) / mine.sum()) ** 0.5


def test_both_layers_share_the_probability(drawn):
    "Untouched: the mean of (1 - p)² over p in 0.2..0.8, 0.28; probabilities of their own would give 0.25."
    untouched = 1 - changed(*drawn).float().mean()
    assert abs(untouched - 0.28) < 0.01


def test_every_operation_of_dds_is_drawn_alike(drawn):
    "The fifteen are told apart by what they do to one image with one sign; each gets 1/15."
    u = drawn[1][:, :6000].clone()
    u[9], u[10], u[11], u[5], u[12:14] = 1, 0, 1, 0, 0.5   # the first layer always, plus, centre in the middle
    x = drawn[0][:1].expand(6000, -1, -1, -1)
    out = Augment(randaugment=17, randaugment_style="dds", fill=128).apply(x, u)
    counts = out.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 15 and ((counts - 400).abs() < 5 * 400 ** 0.5).all()


# ---- grey

def test_padding_and_fill_are_grey(photos):
    u = torch.tensor([[0.9], [0.0], [0.0]]).expand(3, 48)   # the top left window of the padded image
    for fill in (0, 128):
        out = flip_crop(photos, u, True, 4, fill)
        assert (out[:, :, :4] == fill).all() and (out[:, :, :, :4] == fill).all()
        assert torch.equal(out[:, :, 4:, 4:], photos[:, :, :28, :28])
    away = torch.tensor([[1.0, 0, 40, 0, 1, 0]]).expand(48, 6)
    assert (warp(photos, away, 77) == 77).all() and (warp(photos, away) == 0).all()


def test_cutout_is_grey_before_normalisation_and_the_mean_color_without_fill(photos):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    for fill, expected in ((128, [(128 / 255 - m) / s for m, s in zip(mean, std)]), (0, [0.0] * 3)):
        augment = Augment(cutout=16, mean=mean, std=std, fill=fill)
        u = augment.draw(48, seeded(0, "t"))
        out, plain = augment.apply(photos, u), augment(photos)
        inside = cutout(torch.ones(48, 1, 32, 32), u[7:9], 16)[:, 0] == 0
        assert torch.equal(out.permute(0, 2, 3, 1)[~inside], plain.permute(0, 2, 3, 1)[~inside])
        square = out.permute(0, 2, 3, 1)[inside]
        torch.testing.assert_close(square, torch.tensor(expected).expand_as(square))


def test_style_and_fill_come_from_the_recipe():
    assert (DataRecipe().randaugment_style, DataRecipe().fill) == ("uniform", 0)
    recipe = DataRecipe(flip=True, crop=1, randaugment=17, randaugment_style="dds", cutout=2, fill=128)
    augment = make_augment(recipe, load_data(DataRecipe()).train)
    assert (augment.randaugment_style, augment.fill, augment.randaugment) == ("dds", 128, 17)
    assert augment.draw(4, seeded(0, "t")).shape == (16, 4) and Augment().draw(4, seeded(0, "t")).shape == (9, 4)


@pytest.mark.parametrize("bad,words", [({"randaugment_style": "ddss"}, "randaugment_style = 'ddss'"),
                                       ({"fill": 256}, "fill = 256"), ({"fill": -1}, "fill = -1")])
def test_wrong_style_and_fill_are_refused(bad, words):
    for make in (Augment, DataRecipe):
        with pytest.raises(ValueError, match=words): make(**bad)


def test_fill_wants_grey_levels():
    with pytest.raises(ValueError, match="fill = 128: needs uint8 images"):
        Augment(crop=1, fill=128)(torch.rand(2, 3, 8, 8), seeded(0, "t"))

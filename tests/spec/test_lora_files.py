"""LoRA files of other programs: each read to the value that Diffusers or PEFT gives, or refused in one line."""

import copy
import re
import warnings

import lora_files
import numpy as np
import pytest
import torch
from lora_files import CONVOLUTIONS, LINEAR, MORE, ONE_BY_ONE, TEXT, TEXT_MLP, File, Maker, header, write
from safetensors.numpy import load_file
from tiny import stable_diffusion

from flax_diffusion.convert import convert
from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.families.stable_diffusion import STABLE_DIFFUSION
from flax_diffusion.core.spec.adapters import KohyaNames
from flax_diffusion.core.spec.lora_files import read_lora_layers
from flax_diffusion.core.spec.merging import with_adapters
from flax_diffusion.core.spec.pipeline import open_pipeline
from torch_backend.modules import build_modules, shapes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), length=40, unet=lora_files.UNET)


@pytest.fixture(scope="module")
def known(model):
    return shapes(open_pipeline(str(model)))


@pytest.fixture(scope="module")
def pipe(model):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model)


def unet(*names):
    return [("unet", name) for name in names]


def text(*names):
    return [("text_encoder", name) for name in names]


NAMES = KohyaNames(STABLE_DIFFUSION.lora_prefixes, refused=STABLE_DIFFUSION.lora_refused)
BOTH = unet(*LINEAR) + text(*TEXT)
RANKS = {LINEAR[0]: 1, LINEAR[1]: 3, TEXT[0]: 1, CONVOLUTIONS[0]: 4}


def of_layer(name):
    return RANKS.get(name, 2)


def alpha_of_layer(name):
    return {LINEAR[0]: 3.0, CONVOLUTIONS[1]: 0.5}.get(name, 1.5)


def settings(**options):
    return header(unet={"r": 2, "lora_alpha": 2, "target_modules": LINEAR} | options)


TO_K, TO_OUT = "attn1.to_k", "attn2.to_out.0"


def readable(shapes_of):
    """Every file that is read."""
    make = Maker(shapes_of).file
    f = lora_files
    files = [
        make("peft", BOTH, f.peft),
        make("peft_unet", unet(*LINEAR), f.peft, rank=4),
        make("peft_text", text(*TEXT), f.peft),
        make("peft_half", unet(*LINEAR), f.peft, dtype=np.float16),
        make("peft_ranks", unet(*LINEAR), f.peft, rank=of_layer),
        make("peft_short_text", BOTH, f.short_peft),
        make("peft_more_layers", unet(*LINEAR, *MORE), f.peft),
        make("peft_one_by_one", unet(*ONE_BY_ONE), f.peft),
        make("peft_convolutions", unet(*LINEAR, *CONVOLUTIONS), f.peft),
        make("header_alpha", unet(*LINEAR), f.peft, alpha=5, header=settings(lora_alpha=5)),
        make("header_rslora", unet(*LINEAR), f.peft, alpha=6 * 2**0.5, header=settings(lora_alpha=6, use_rslora=True)),
        make(
            "header_alpha_pattern", unet(*LINEAR), f.peft, alpha=lambda name: 7 if name.endswith(TO_K) else 2,
            header=settings(alpha_pattern={"to_k": 7}),
        ),
        make(
            "header_rank_pattern", unet(*LINEAR), f.peft, rank=lambda name: 3 if name.endswith(TO_K) else 2, alpha=2,
            header=settings(rank_pattern={"attn1.to_k": 3}),
        ),
        make(
            "header_patterns", unet(*LINEAR), f.peft, rank=lambda name: 4 if name.endswith(TO_OUT) else 2,
            alpha=lambda name: {LINEAR[1]: 7, LINEAR[3]: 3}.get(name, 2),
            header=settings(rank_pattern={LINEAR[3]: 4}, alpha_pattern={f"^{LINEAR[1]}": 7, "to_out.0": 3, "q": 9}),
        ),
        make(
            "header_rslora_patterns", unet(*LINEAR), f.peft, rank=lambda name: 4 if name.endswith(TO_OUT) else 2,
            alpha=lambda name: 2 * 4**0.5 if name.endswith(TO_OUT) else 2 * 2**0.5,
            header=settings(rank_pattern={LINEAR[3]: 4}, use_rslora=True),
        ),
        make(
            "header_of_both", BOTH, f.peft, alpha=lambda name: 5 if name in TEXT else 3,
            header=header(
                unet={"r": 2, "lora_alpha": 3, "target_modules": LINEAR},
                text_encoder={"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]},
            ),
        ),
        make("diffusers_2024", BOTH, f.diffusers_2024),
        make("diffusers_2024_ranks", unet(*LINEAR, *MORE), f.diffusers_2024, rank=of_layer),
        make("diffusers_2024_text", text(*TEXT, *TEXT_MLP), f.diffusers_2024),
        make("diffusers_2023", BOTH, f.diffusers_2023),
        make("diffusers_2023_unet", unet(*LINEAR), f.diffusers_2023, rank=4),
        make("diffusers_2023_text", text(*TEXT), f.diffusers_2023),
        make("diffusers_first", unet(*LINEAR), f.first_diffusers, by="unet"),
    ]  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": LINEAR}
    ranks = {"rank_pattern": {"to_k": 3}}
    text_config = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    files += [
        make("peft_model", unet(*LINEAR), f.bare_peft, alpha=4, beside=config, by="peft"),
        make(
            "peft_model_pattern", unet(*LINEAR), f.bare_peft, alpha=lambda name: 9 if name.endswith(TO_K) else 4,
            beside=config | {"alpha_pattern": {"to_k": 9}}, by="peft",
        ),
        make(
            "peft_model_ranks", unet(*LINEAR), f.bare_peft, rank=lambda name: 3 if name.endswith(TO_K) else 2, alpha=4,
            beside=config | ranks, by="peft",
        ),
        make(
            "peft_model_rslora", unet(*LINEAR), f.bare_peft, alpha=4 * 2**0.5, beside=config | {"use_rslora": True},
            by="peft",
        ),
        make(
            "peft_model_text", text(*TEXT), f.short_bare_peft, alpha=4, beside=config | text_config, by="peft_text",
        ),
        make("kohya", BOTH, f.kohya, alpha=1),
        make("kohya_unet", unet(*LINEAR, *MORE), f.kohya, alpha=1, rank=4),
        make("kohya_no_alpha", BOTH, f.kohya),
        make("kohya_alpha_of_one_axis", BOTH, f.kohya, alpha=3, said=lambda value: np.array([value])),
        make("kohya_alphas", unet(*LINEAR), f.kohya, alpha=alpha_of_layer, by="formula"),
        make("kohya_ranks", BOTH, f.kohya, rank=of_layer, alpha=1),
        make("kohya_ranks_and_alphas", BOTH, f.kohya, rank=of_layer, alpha=alpha_of_layer, by="formula"),
        make("kohya_te1", BOTH, f.kohya_te1, alpha=1),
        make("kohya_short_text", BOTH, f.short_kohya, alpha=1),
        make("kohya_half", BOTH, f.kohya, alpha=2, dtype=np.float16),
        make("kohya_mlp", text(*TEXT, *TEXT_MLP), f.kohya, alpha=1),
        make("locon", unet(*LINEAR, *CONVOLUTIONS), f.kohya, alpha=1),
        make("locon_ranks", unet(*LINEAR, *CONVOLUTIONS), f.kohya, rank=of_layer, alpha=1),
        make("locon_alphas", unet(*LINEAR, *CONVOLUTIONS), f.kohya, alpha=alpha_of_layer, by="formula"),
        make(
            "locon_alpha_of_one", unet(*LINEAR, *CONVOLUTIONS), f.kohya,
            alpha=lambda name: 0.5 if name == CONVOLUTIONS[1] else 1.5,
        ),
        make("locon_one_by_one", unet(*ONE_BY_ONE), f.kohya, alpha=1),
    ]  # fmt: skip
    return {file.name: file for file in [*files, tucker(shapes_of)]}


def tucker(shapes_of):
    """A LoCon of three matrices, which Diffusers does not read: W = Σ up·mid·down, by LyCORIS' formula."""
    rows, columns, *kernel = shapes_of["unet"][f"{CONVOLUTIONS[0]}.weight"]
    rng = np.random.default_rng(0)
    sizes = {"down": (3, columns, 1, 1), "mid": (2, 3, *kernel), "up": (rows, 2, 1, 1)}
    parts = {name: rng.standard_normal(size, np.float32) / 4 for name, size in sizes.items()}
    key = lora_files.kohya("unet", CONVOLUTIONS[0])[2].removesuffix(".alpha")
    tensors = {f"{key}.lora_{name}.weight": part for name, part in parts.items()} | {f"{key}.alpha": np.float32([1])}
    down = np.einsum("rshw,si->rihw", parts["mid"], parts["down"][:, :, 0, 0])
    adds = {("unet", CONVOLUTIONS[0]): (down, parts["up"], 1 / 2)}
    return File("locon_tucker", tensors, adds=adds, by="formula")


def of_pipeline(pipe):
    """What a pipeline predicts for a prompt."""
    with torch.no_grad():
        context = pipe.text_encoder(torch.arange(10)[None])[0]
        return predicted(pipe.unet, context)


def predicted(unet, context):
    return unet(torch.ones(1, 4, 8, 8), torch.tensor(10), context).sample.numpy()


def theirs(pipe, file, path):
    """The same with a LoRA that Diffusers or PEFT put in."""
    pipe = copy.deepcopy(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if file.by == "diffusers":
            pipe.load_lora_weights(path)
        elif file.by == "unet":
            pipe.unet.load_lora_adapter(load_as_torch(path), prefix=None)
        else:
            from peft import PeftModel

            name = {"peft": "unet", "peft_text": "text_encoder"}[file.by]
            setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), path.parent).merge_and_unload())
    return of_pipeline(pipe)


def load_as_torch(path):
    return {name: torch.from_numpy(array) for name, array in load_file(path).items()}


def ours(model, path):
    """The same with what is merged here."""
    spec = with_adapters(open_pipeline(str(model)), shapes, [str(path)], 1.0, [])
    kinds = {"frozen_dtype": torch.float32, "trained_dtype": torch.float32, "device": torch.device("cpu")}
    modules = build_modules(spec, seed=0, **kinds).by_name
    with torch.no_grad():
        return predicted(modules["unet"], modules["text_encoder"](torch.arange(10)[None])[0])


def test_files_of_all_programs(model, known, pipe, tmp_path, figure):
    """Each is read to what its matrices make, and draws what Diffusers or PEFT draw with it."""
    before, compared = of_pipeline(pipe), 0
    files = readable(known)
    for file in files.values():
        path = write(file, tmp_path)
        found = read_lora_layers(path.parent, known, NAMES)
        assert {(model, name) for model, own in found.items() for name in own} == file.adds.keys(), file.name
        for (component, layer), (down, up, scale) in file.adds.items():
            shape = known[component][f"{layer}.weight"]
            expected = (up.reshape(len(up), -1).astype(np.float64) @ down.reshape(len(down), -1) * scale).reshape(shape)
            added = found[component][layer].added(shape)
            np.testing.assert_allclose(added, expected, atol=1e-6, err_msg=f"{file.name}: {layer}")
        if file.by != "formula":
            expected = theirs(pipe, file, path)
            assert np.abs(expected - before).max() > 1e-3, file.name
            np.testing.assert_allclose(ours(model, path), expected, atol=1e-5, err_msg=file.name)
            compared += 1
    assert len(files) >= 40
    figure("lora", f"{len(files)} LoRA files read; {compared} of them draw what Diffusers or PEFT draw, within 1e-5")


def other(name, refused, *tensors, layer=LINEAR[0], **rest):
    """A file of a plain LoRA, and in it what else its program writes."""
    flat = lora_files.kohya("unet", layer)[2].removesuffix(".alpha")
    made = File(name, refused=refused, **rest)
    for tensor in tensors:
        made.tensors[tensor.format(flat=flat, layer=f"unet.{layer}")] = np.ones((2, 2), np.float32)
    return made


PAIR = ("{layer}.lora_A.weight", "{layer}.lora_B.weight")
KOHYA_PAIR = ("{flat}.lora_down.weight", "{flat}.lora_up.weight")
MERGE = "merge it into its model with the program that made it, and give that model by --model"
OTHERS = [
    other("dora_kohya", f"holds DoRA (1 of its 3 tensors), .*{MERGE}", *KOHYA_PAIR, "{flat}.dora_scale"),
    other("dora_peft", "holds DoRA", *PAIR, "{layer}.lora_magnitude_vector"),
    other(
        "loha", "holds LoHa (4 of its 5 tensors)", "{flat}.hada_w1_a", "{flat}.hada_w1_b", "{flat}.hada_w2_a",
        "{flat}.hada_w2_b", "{flat}.alpha",
    ),
    other("loha_peft", "holds LoHa", "base_model.model.x.hada_w1_a", "base_model.model.x.hada_w1_b"),
    other("lokr", "holds LoKr", "{flat}.lokr_w1", "{flat}.lokr_w2_a", "{flat}.lokr_w2_b"),
    other("ia3_lycoris", "holds (IA)³", "{flat}.weight", "{flat}.on_input"),
    other("ia3_peft", "holds (IA)³", "base_model.model.x.ia3_l"),
    other("oft", "holds OFT", "{flat}.oft_blocks", "{flat}.alpha"),
    other("boft", "holds BOFT", "base_model.model.x.boft_R", "base_model.model.x.boft_s"),
    other("glora", "holds GLoRA", "{flat}.a1.weight", "{flat}.a2.weight", "{flat}.b1.weight", "{flat}.b2.weight"),
    other("adalora", "holds AdaLoRA", *PAIR, "{layer}.lora_E"),
    other("vera", "holds VeRA", "base_model.model.x.vera_lambda_b"),
    other("full", "holds differences of whole weights", "{flat}.diff", "{flat}.diff_b"),
    other("norms", "holds differences of whole weights", *KOHYA_PAIR, "lora_unet_norm.w_norm", "lora_unet_norm.b_norm"),
    other("bias", "holds LoRA with biases", *PAIR, "{layer}.lora_B.bias"),
    other(
        "sparse", "holds LoRA with biases (3 of its 5", *KOHYA_PAIR, "{flat}.bias_indices", "{flat}.bias_values",
        "{flat}.bias_size",
    ),
    other("embedding", "holds LoRA of an embedding table", "text_encoder.x.lora_embedding_A"),
    other("words", "holds new words of textual inversion", *KOHYA_PAIR, "bundle_emb.dog.string_to_param.*"),
    other("xl", "holds LoRA of Stable Diffusion XL", *KOHYA_PAIR, "lora_te2_text_model_x.lora_down.weight"),
    other("control", "holds a Control-LoRA", "lora_controlnet", "input_blocks.0.0.weight"),
    other("half", "lora_A.weight has no second matrix", PAIR[0]),
    other("misfit", r"to_q is 2 x 2, the model's is (8, 8)", *PAIR),
    other("flux", "x.to_q is no layer of the model: give the model that it was trained on by --model",
          "transformer.x.to_q.lora_A.weight", "transformer.x.to_q.lora_B.weight"),
    other("stranger", "other.bias is no part of a LoRA", "other.bias", *PAIR),
    other("none", "holds no LoRA weights: name the file that does", "other.weight"),
    other("no_json", "lora_adapter_metadata in its header is not JSON", *PAIR, header={"lora_adapter_metadata": "{"}),
    other("use_dora", "says DoRA", *PAIR, header=settings(use_dora=True)),
    other("pissa", "sets init_lora_weights to 'pissa'", *PAIR, header=settings(init_lora_weights="pissa")),
    other("qalora", "sets use_qalora to True", *PAIR, header=settings(use_qalora=True)),
    other("bias_setting", "sets bias to 'all'", *PAIR, header=settings(bias="all")),
    other("rank_text", "sets r to 'two'", *PAIR, header=settings(r="two")),
    other("alpha_nan", "sets lora_alpha to nan", *PAIR, header=settings(lora_alpha=float("nan"))),
    other("pattern", "'to_[qk]', a regular expression", *PAIR, header=settings(alpha_pattern={"to_[qk]": 4})),
    other("vera_config", "sets peft_type to 'VERA'", *PAIR, beside={"peft_type": "VERA"}),
]  # fmt: skip


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: file.name)
def test_files_of_another_kind(file, known, tmp_path):
    path = write(file, tmp_path)
    words = ".*".join(map(re.escape, file.refused.split(".*")))
    with pytest.raises(WeightsError, match=words) as caught:
        read_lora_layers(path, known, NAMES)
    assert str(path.parent) in str(caught.value)


def test_values_that_no_layer_can_have(known, tmp_path):
    make = Maker(known).file
    twice = make("twice", unet(*LINEAR), lora_files.peft)
    again = make("again", unet(LINEAR[0]), lora_files.diffusers_2024)
    twice.tensors |= again.tensors
    spoilt = {"rank": make("rank", unet(*LINEAR), lora_files.peft, rank=3, header=settings()), "twice": twice}
    for name, value in (("alphas", [1, 2]), ("endless", [np.inf])):
        spoilt[name] = make(name, unet(*LINEAR), lora_files.kohya, alpha=1, said=lambda _, v=value: np.float32(v))
    kernels = {"kernel": lambda a: a[..., :1], "line": lambda a: a.reshape(*a.shape[:2], 9), "empty": lambda a: a[:0]}
    for name, change in kernels.items():
        spoilt[name] = made = make(name, unet(CONVOLUTIONS[0]), lora_files.peft)
        made.tensors = {key: change(array) if "lora_A" in key else array for key, array in made.tensors.items()}
    for name, says in (
        ("rank", r"header says rank 2 for unet\..*, which is of rank 3"),
        ("twice", "is there twice"),
        ("alphas", r"has the alpha \[1.0, 2.0\], must be one finite number"),
        ("endless", r"has the alpha \[inf\], must be one finite number"),
        ("kernel", r"is 8 x 8 with 3 x 1 pixels, the model's is \(8, 8, 3, 3\)"),
        ("line", r"is 8 x 8 with 9 pixels, the model's is \(8, 8, 3, 3\)"),
        ("empty", r"has matrices of shapes \(0, 8, 3, 3\), \(8, 2, 1, 1\), which do not fit together"),
    ):
        with pytest.raises(WeightsError, match=says):
            read_lora_layers(write(spoilt[name], tmp_path), known, NAMES)


def test_settings_of_one_model_only(known, tmp_path, caplog):
    file = Maker(known).file("one", BOTH, lora_files.peft, header=settings(lora_alpha=4))
    found = read_lora_layers(write(file, tmp_path), known, NAMES)
    assert {layer.alpha for layer in found["unet"].values()} == {4}
    assert {layer.alpha for layer in found["text_encoder"].values()} == {2}
    assert "its header has no settings for text_encoder; each alpha is taken to be the rank" in caplog.text


def test_files_that_are_not_there(known, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "named").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / f"named/{name}.safetensors").write_bytes(b"")
    (tmp_path / "old.bin").write_bytes(b"")
    for name, says in (
        ("nowhere.safetensors", r"--lora .*nowhere\.safetensors does not exist: check the path"),
        ("empty", r"empty holds no pytorch_lora_weights\.safetensors or adapter_model\.safetensors: name the file"),
        ("named", r"; it holds cat\.safetensors, dog\.safetensors: name the file itself"),
        ("old.bin", r"old\.bin is pickled, and loading it can run code: convert it to safetensors first"),
        ("named/dog.safetensors", "is not a whole safetensors file"),
    ):
        with pytest.raises(WeightsError, match=says):
            read_lora_layers(tmp_path / name, known, NAMES)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_ranks_and_alphas_of_layers_survive_a_change_of_format(model, known, pipe, tmp_path, form):
    """And Diffusers reads what is written, but for kohya's alphas of attention, which it does not tell apart."""
    alpha = alpha_of_layer if form == "peft" else 1
    file = Maker(known).file("mixed", [*BOTH, *unet(*CONVOLUTIONS)], lora_files.kohya, rank=of_layer, alpha=alpha)
    path = write(file, tmp_path)
    out = convert(model, tmp_path / form, lora=[str(path)], format=form) / path.name
    before, after = read_lora_layers(path, known, NAMES), read_lora_layers(out, known, NAMES)
    for component, own in before.items():
        for name, layer in own.items():
            shape = known[component][f"{name}.weight"]
            np.testing.assert_allclose(after[component][name].added(shape), layer.added(shape), atol=1e-6)
    np.testing.assert_allclose(theirs(pipe, File("", by="diffusers"), out), ours(model, path), atol=1e-5)


def test_strength_in_another_format(model, known, tmp_path):
    path = write(Maker(known).file("one", unet(*LINEAR), lora_files.peft), tmp_path)
    out = convert(model, tmp_path / "out", lora=[f"{path}:0.5"], lora_scale=3, format="kohya") / path.name
    before, after = (read_lora_layers(file, known, NAMES)["unet"] for file in (path, out))
    shape = known["unet"][f"{LINEAR[0]}.weight"]
    np.testing.assert_allclose(after[LINEAR[0]].added(shape), 1.5 * before[LINEAR[0]].added(shape), atol=1e-6)


def test_strengths(model, known, tmp_path):
    """PATH:STRENGTH times --lora_scale, of several files."""
    paths = [write(Maker(known).file(name, unet(*LINEAR), lora_files.peft), tmp_path) for name in ("one", "two")]
    made = convert(model, tmp_path / "made", lora=[f"{paths[0]}:0.5", str(paths[1])], lora_scale=-2)
    files = [load_file(root / "unet/diffusion_pytorch_model.safetensors") for root in (model, made)]
    one, two = (read_lora_layers(path, known, NAMES)["unet"] for path in paths)
    for name in LINEAR:
        shape = known["unet"][f"{name}.weight"]
        change = files[1][f"{name}.weight"] - files[0][f"{name}.weight"]
        np.testing.assert_allclose(change, -1 * one[name].added(shape) - 2 * two[name].added(shape), atol=1e-6)

"""What becomes of import statements: exact new texts, in the styles that programs have."""

import ast
import random
import re
import textwrap

import pytest

from flax_diffusion.core.migration import code
from flax_diffusion.core.migration.edits import Lines, apply
from flax_diffusion.migrate import homes

REWRITES = {
    "split": (
        "from diffusers import FlaxAutoencoderKL, StableDiffusionPipeline  # models\n",
        "from diffusers import StableDiffusionPipeline\nfrom flax_diffusion import FlaxAutoencoderKL  # models\n",
    ),
    "only the module changes": (
        "from  diffusers  import FlaxAutoencoderKL as VAE,FlaxDDPMScheduler   # noqa\n",
        "from  flax_diffusion  import FlaxAutoencoderKL as VAE,FlaxDDPMScheduler   # noqa\n",
    ),
    "one name a line, with comments": (
        """\
        from diffusers import (
            # models
            FlaxAutoencoderKL,
            FlaxUNet2DConditionModel,  # the denoiser
            # noise
            DDPMScheduler,

            FlaxDDPMScheduler as Noise,
            StableDiffusionPipeline,   # to save
        )  # end
        """,
        """\
        from diffusers import (
            # noise
            DDPMScheduler,
            StableDiffusionPipeline,   # to save
        )
        from flax_diffusion import (
            # models
            FlaxAutoencoderKL,
            FlaxUNet2DConditionModel,  # the denoiser

            FlaxDDPMScheduler as Noise,
        )  # end
        """,
    ),
    "one name a line": (
        """\
        from diffusers import (
            FlaxAutoencoderKL,
            FlaxDDPMScheduler,
            StableDiffusionPipeline
        )
        """,
        """\
        from diffusers import (
            StableDiffusionPipeline
        )
        from flax_diffusion import FlaxAutoencoderKL, FlaxDDPMScheduler
        """,
    ),
    "several names a line": (
        """\
        from diffusers import (FlaxAutoencoderKL, FlaxDDPMScheduler,  # both
                               DDPMScheduler, StableDiffusionPipeline)
        """,
        """\
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from flax_diffusion import (
            FlaxAutoencoderKL,
            FlaxDDPMScheduler,  # both
        )
        """,
    ),
    "a comment behind the parenthesis, none behind the last name": (
        """\
        from diffusers import (  # noqa: F401
            DDPMScheduler,
            FlaxDDPMScheduler  # noise
            # end
        )
        """,
        """\
        from diffusers import (  # noqa: F401
            DDPMScheduler
            # end
        )
        from flax_diffusion import (
            FlaxDDPMScheduler  # noise
        )
        """,
    ),
    "backslash": (
        "from diffusers import FlaxAutoencoderKL, \\\n    DDPMScheduler\n",
        "from diffusers import DDPMScheduler\nfrom flax_diffusion import FlaxAutoencoderKL\n",
    ),
    "one line in parentheses": (
        "from diffusers import (FlaxAutoencoderKL, DDPMScheduler)\n",
        "from diffusers import (DDPMScheduler)\nfrom flax_diffusion import FlaxAutoencoderKL\n",
    ),
    "transformers": (
        "from transformers import CLIPTokenizer, FlaxCLIPTextModel, set_seed\n",
        "from flax_diffusion import FlaxCLIPTextModel\nfrom transformers import CLIPTokenizer, set_seed\n",
    ),
    "modules": (
        """\
        from diffusers.models.unet_2d_condition_flax import FlaxUNet2DConditionModel
        from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel as Again
        from diffusers.models.vae_flax import FlaxAutoencoderKL
        from diffusers.schedulers import FlaxPNDMScheduler
        from diffusers.schedulers.scheduling_ddpm_flax import DDPMSchedulerState, FlaxDDPMScheduler
        from diffusers.schedulers.scheduling_utils_flax import CommonSchedulerState
        from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModel
        """,
        """\
        from flax_diffusion import FlaxUNet2DConditionModel
        from flax_diffusion import FlaxUNet2DConditionModel as Again
        from flax_diffusion import FlaxAutoencoderKL
        from flax_diffusion import FlaxPNDMScheduler
        from flax_diffusion import FlaxDDPMScheduler
        from flax_diffusion.schedulers import DDPMSchedulerState
        from flax_diffusion.schedulers import CommonSchedulerState
        from flax_diffusion import FlaxCLIPTextModel
        """,
    ),
    "inside of blocks": (
        """\
        try:
            from diffusers import FlaxDDIMScheduler, DDIMScheduler
        except ImportError:
            FlaxDDIMScheduler = None
        if True: from diffusers import FlaxPNDMScheduler, PNDMScheduler
        import os; from diffusers import FlaxDDPMScheduler, DDPMScheduler; print(os)


        def load():
        \tfrom transformers import FlaxCLIPTextModel, CLIPTokenizer
        \treturn FlaxCLIPTextModel
        """,
        """\
        try:
            from diffusers import DDIMScheduler
            from flax_diffusion import FlaxDDIMScheduler
        except ImportError:
            FlaxDDIMScheduler = None
        if True: from diffusers import PNDMScheduler; from flax_diffusion import FlaxPNDMScheduler
        import os; from diffusers import DDPMScheduler; from flax_diffusion import FlaxDDPMScheduler; print(os)


        def load():
        \tfrom flax_diffusion import FlaxCLIPTextModel
        \tfrom transformers import CLIPTokenizer
        \treturn FlaxCLIPTextModel
        """,
    ),
    "attributes, all of them": (
        "import os, diffusers\n\nvae = diffusers.FlaxAutoencoderKL.load('é', x=diffusers.FlaxDDPMScheduler)\n",
        "import os\nimport flax_diffusion\n\n"
        "vae = flax_diffusion.FlaxAutoencoderKL.load('é', x=flax_diffusion.FlaxDDPMScheduler)\n",
    ),
    "attributes, some of them": (
        """\
        import diffusers as d  # models
        import transformers

        a = "é", d.models.vae_flax.FlaxAutoencoderKL, d.DDPMScheduler
        b: transformers.FlaxCLIPTextModel
        """,
        """\
        import diffusers as d
        import flax_diffusion  # models
        import flax_diffusion

        a = "é", flax_diffusion.FlaxAutoencoderKL, d.DDPMScheduler
        b: flax_diffusion.FlaxCLIPTextModel
        """,
    ),
    "an alias stays": (
        "import diffusers as d\nvae = d.FlaxAutoencoderKL\nother = d.models.FlaxUNet2DConditionModel\n",
        "import flax_diffusion as d\nvae = d.FlaxAutoencoderKL\nother = d.FlaxUNet2DConditionModel\n",
    ),
    "an import of ours is there": (
        "import flax_diffusion\nimport diffusers\nx = diffusers.FlaxDDIMScheduler, diffusers.DDIMScheduler\n",
        "import flax_diffusion\nimport diffusers\nx = flax_diffusion.FlaxDDIMScheduler, diffusers.DDIMScheduler\n",
    ),
    "modules as names": (
        """\
        from diffusers.models import vae_flax, AutoencoderKL
        from diffusers.schedulers import scheduling_ddpm_flax as noise
        import diffusers.models.vae_flax
        import diffusers.schedulers.scheduling_pndm_flax as pndm

        a = vae_flax.FlaxAutoencoderKL, noise.DDPMSchedulerState, pndm.FlaxPNDMScheduler
        b = diffusers.models.vae_flax.FlaxAutoencoderKL, diffusers.__version__
        """,
        """\
        import flax_diffusion
        from diffusers.models import AutoencoderKL
        import flax_diffusion.schedulers
        import diffusers
        import flax_diffusion
        import flax_diffusion as pndm

        a = flax_diffusion.FlaxAutoencoderKL, flax_diffusion.schedulers.DDPMSchedulerState, pndm.FlaxPNDMScheduler
        b = flax_diffusion.FlaxAutoencoderKL, diffusers.__version__
        """,
    ),
    "nothing": (
        """\
        from diffusers import DDPMScheduler, UNet2DModel
        from transformers import CLIPTextModel
        from flax_diffusion import FlaxAutoencoderKL
        from .diffusers import FlaxDDPMScheduler
        from mine import FlaxDDIMScheduler
        from flax.jax_utils import replicate
        from flax.training.common_utils import shard
        import diffusers, numpy as diffusers_flax

        class FlaxPNDMScheduler: ...
        a = diffusers.DDPMScheduler, mine.FlaxDDPMScheduler, getattr(diffusers, "DDPMScheduler")
        b = FlaxAutoencoderKL.from_pretrained("m", from_pt=True, dtype=None), AutoModel.from_pretrained("m", proxies={})
        """,
        None,
    ),
}


def find(text):
    lines = Lines(text)
    return code.Finder(lines, code.parse(text), homes())


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("case", REWRITES)
def test_rewrites(case, ending):
    old, new = (textwrap.dedent(text or "").replace("\n", ending) for text in REWRITES[case])
    found = find(old)
    assert apply(old, found.edits) == (new or old)
    assert not found.remarks
    ast.parse(new)
    again = find(new or old)
    assert (again.edits, again.remarks) == ([], set())


REMARKS = {
    "from diffusers import FlaxFooModel, FlaxDDPMScheduler": "flax_diffusion has no FlaxFooModel: copy it",
    "import diffusers\ndiffusers.models.FlaxFooModel.load(1)": "flax_diffusion has no FlaxFooModel: copy it",
    "from transformers import FlaxBertModel": "take the PyTorch class BertModel, or keep transformers<5",
    "from diffusers.utils import is_flax_available": "diffusers.utils has no is_flax_available any more: drop the test",
    "from diffusers.models import attention_flax": "diffusers.models.attention_flax is gone: import the names",
    "import diffusers.models.attention_flax": "diffusers.models.attention_flax is gone: import the names",
    "from diffusers.models.vae_flax import *": "diffusers.models.vae_flax is gone",
    "from diffusers import *\nFlaxDDPMScheduler()": "add `from flax_diffusion import FlaxDDPMScheduler`",
    "from diffusers.models.modeling_flax_pytorch_utils import convert_it": "flax_diffusion.convert",
    "import diffusers\n\ndiffusers.models.vae_flax.FlaxNothing()": "flax_diffusion has no FlaxNothing",
    "import diffusers\ngetattr(diffusers, 'FlaxDDPMScheduler')": "getattr finds no FlaxDDPMScheduler there",
    "patch('diffusers.FlaxDDPMScheduler')": "write flax_diffusion.FlaxDDPMScheduler",
    "load('diffusers.models.vae_flax')": "the text 'diffusers.models.vae_flax' names Flax code",
    "X.from_pretrained('m', from_flax=True)": "PyTorch classes do not read Flax weights any more",
    "FlaxX.from_pretrained('m', proxies=p)": "proxies is not read any more: set HTTPS_PROXY",
    "FlaxX.from_pretrained('m', use_safetensors=False)": "does not read pickled weights: leave it out",
}


@pytest.mark.parametrize("text", REMARKS)
def test_remarks(text):
    (remark,) = find(text).remarks
    assert REMARKS[text] in remark.text
    assert remark.line == text.count("\n") + 1 if "import *" not in text else 1


def test_a_name_that_is_lacking_keeps_what_it_comes_from():
    old = "from diffusers.models import vae_flax\na = vae_flax.FlaxNothing, vae_flax.FlaxAutoencoderKL\n"
    new = (
        "import flax_diffusion\nfrom diffusers.models import vae_flax\n"
        "a = vae_flax.FlaxNothing, flax_diffusion.FlaxAutoencoderKL\n"
    )
    assert apply(old, find(old).edits) == new


def bound(tree):
    """Where each name of a program comes from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("seed", range(200))
def test_statements_of_any_layout_bind_the_same_names_and_keep_their_comments(seed):
    draw = random.Random(seed)
    ours = ["FlaxAutoencoderKL", "FlaxDDPMScheduler as Noise", "FlaxPNDMScheduler", "FlaxUNet2DConditionModel"]
    theirs = ["DDPMScheduler", "UNet2DModel as Model", "AutoencoderKL"]
    names = draw.sample(ours, draw.randint(1, 4)) + draw.sample(theirs, draw.randint(0, 3))
    draw.shuffle(names)
    indent = draw.choice(["", "    ", "\t"])
    text = f"{'if True:' if indent else 'x = 1'}\n{indent}from diffusers import ("
    for number, name in enumerate(names):
        text += draw.choice(["", " ", f"\n{indent}    ", f"  # a{number}\n{indent}  # b{number}\n\n{indent}    "])
        text += name + ("," if number + 1 < len(names) else draw.choice(["", ","]))
    text += (
        draw.choice(["", "  # c\n", "\n", f"\n{indent}# d\n{indent}"]) + f"){draw.choice(['', '  # e', '; y = 2'])}\n"
    )
    new = apply(text, find(text).edits)
    expected = {
        name: path.replace("diffusers.", "flax_diffusion.") if "Flax" in path else path
        for name, path in bound(ast.parse(text))
    }
    assert dict(bound(ast.parse(new))) == expected
    comments = re.compile(r"#.*")
    assert sorted(comments.findall(new)) == sorted(comments.findall(text))
    assert not find(new).edits


def test_names_in_formatted_texts_move_or_are_told():
    text = "import diffusers\nx = f'é {1} {diffusers.FlaxDDPMScheduler!r} {diffusers.DDPMScheduler}'\n"
    found = find(text)
    moved = "flax_diffusion.FlaxDDPMScheduler" in apply(text, found.edits)
    assert moved != any("write flax_diffusion.FlaxDDPMScheduler for" in one.text for one in found.remarks)
    ast.parse(apply(text, found.edits))


def test_every_public_name_has_a_home_and_modules_of_ours_too():
    import flax_diffusion

    assert {homes()[name] for name in flax_diffusion.__all__} == {"flax_diffusion"}
    assert homes()["DDPMSchedulerState"] == "flax_diffusion.schedulers"

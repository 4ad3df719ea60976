"""What is not the same as in Diffusers 0.39 and Transformers 4.57, and why."""

from registry import CALLS

SAME = "same"
KNOWN = {}
"""A call to its outcome beside 0.39, beside 0.39 with JAX's old names and PyTorch's constants, and the reason."""


def known(reason, outcome, mended, *patterns):
    """List the calls that begin with one of the patterns; a pattern that ends with `$` is a whole name."""
    for pattern in patterns:
        names = [name for name in CALLS if name == pattern[:-1] or ("$" not in pattern and name.startswith(pattern))]
        assert names, pattern
        for name in names:
            assert name not in KNOWN, name
            KNOWN[name] = (outcome, mended, reason)


def of(names, *methods):
    return [f"{name}.{method}" for name in names for method in methods]


MODELS = ("FlaxAutoencoderKL", "FlaxUNet2DConditionModel", "FlaxControlNetModel")
NOISE = ("FlaxDDIMScheduler", "FlaxDDPMScheduler", "FlaxPNDMScheduler")
SIGMAS = ("FlaxEulerDiscreteScheduler", "FlaxLMSDiscreteScheduler")
TRANSFORMERS = (
    "FlaxCLIPTextModel", "FlaxCLIPTextModelWithProjection", "FlaxCLIPModel", "FlaxCLIPVisionModel",
    "FlaxT5EncoderModel", "FlaxStableDiffusionSafetyChecker",
)  # fmt: skip
PIPELINES = (
    "FlaxStableDiffusionPipeline", "FlaxStableDiffusionImg2ImgPipeline", "FlaxStableDiffusionInpaintPipeline",
    "FlaxStableDiffusionControlNetPipeline", "FlaxStableDiffusionXLPipeline",
)  # fmt: skip
DPM = "FlaxDPMSolverMultistepScheduler"
VE = ("FlaxKarrasVeScheduler", "FlaxScoreSdeVeScheduler")

OLD_NAMES = "0.39 calls JAX by names that JAX 0.10 has not"
known(OLD_NAMES, "0.39 raises AttributeError", SAME, *of(MODELS, "to_bf16$", "to_fp16$", "to_fp32$"))
known(
    OLD_NAMES, "0.39 raises AttributeError", SAME,
    *of(MODELS, "to_bf16: mask", "to_fp16: mask", "to_fp32: mask"),
)  # fmt: skip
known(
    OLD_NAMES, "0.39 raises TypeError", SAME,
    "FlaxDDPMScheduler.step: as many steps as trained$",
)  # fmt: skip
OTHERWISE = ("no such folder", "names of files", "FlaxStableDiffusionSafetyChecker.enable_gradient_checkpointing")
known(
    OLD_NAMES, "0.39 raises TypeError", SAME,
    *(f"{name}$" for name in CALLS
      if name.startswith(TRANSFORMERS[4:]) and not any(part in name for part in OTHERWISE)),
)  # fmt: skip

known(
    "files and configs name PyTorch's class, which then reads them",
    "other values", "other values", *of((*NOISE, *SIGMAS, DPM, *VE), "to_json_string"),
)  # fmt: skip
known(
    "has it, as PyTorch's class does", "0.39 raises AttributeError", "0.39 raises AttributeError",
    *of(("FlaxPNDMScheduler", *SIGMAS, DPM), "get_velocity"), "FlaxScoreSdeVeScheduler.scale_model_input",
)  # fmt: skip
JUMP = "0.39 goes from timestep t to t − 1, whatever the number of steps"
known(
    JUMP, "0.39 raises TypeError", "other numbers",
    *of(["FlaxDDPMScheduler"], "step$", "step: SD", "step: v", "step: sample", "step: an output"),
)  # fmt: skip
known(JUMP, "other numbers", "other numbers", "FlaxDDPMScheduler.step: fixed_large$")
known(
    "0.39 takes the logarithm of the variance for the variance",
    "0.39 raises TypeError", "other numbers", "FlaxDDPMScheduler.step: fixed_small_log",
)  # fmt: skip
known(
    "0.39 takes the logarithm of the variance for the variance",
    "other numbers", "other numbers", "FlaxDDPMScheduler.step: fixed_large_log",
)  # fmt: skip
known(
    "0.39 splits the model's output into as many parts as it has channels",
    "0.39 raises ValueError", "0.39 raises ValueError", "FlaxDDPMScheduler.step: learned",
)  # fmt: skip
known(
    "needs a key; 0.39 draws the same noise in every step without one",
    "ours raises ConfigError", "ours raises ConfigError", "FlaxDDPMScheduler.step: no key",
)  # fmt: skip
known(
    "needs a key; 0.39 draws the same noise in every step without one",
    SAME, "ours raises ConfigError", "FlaxDDPMScheduler.step: no set_timesteps before",
)  # fmt: skip
known(
    "needs a key; 0.39 makes room for noise and adds none",
    "ours raises ConfigError", "ours raises ConfigError", "FlaxDDIMScheduler.step: eta",
)  # fmt: skip
known(
    "0.39 ends at timestep 0, whatever set_alpha_to_one says",
    "other numbers", "other numbers", "FlaxPNDMScheduler.step: SD with Runge-Kutta",
)  # fmt: skip
known(
    "timesteps may be fractions, as PyTorch's, before set_timesteps too",
    "another dtype", "another dtype", *of(SIGMAS, "create_state$", "create_state: SD", "create_state: v"),
    *of(["FlaxEulerDiscreteScheduler"], "create_state: leading", "create_state: trailing"),
    *of(["FlaxLMSDiscreteScheduler"], "set_timesteps"),
)  # fmt: skip
known(
    "0.39 looks noise levels up in the wrong direction",
    "other numbers", "other numbers", "FlaxEulerDiscreteScheduler.add_noise",
)  # fmt: skip
known(
    "starts at steps_offset, as PyTorch's; 0.39 always at 1",
    "other numbers", "other numbers",
    *of(["FlaxEulerDiscreteScheduler"], "set_timesteps: leading", "scale_model_input: leading", "step: leading"),
)  # fmt: skip
known(
    "0.39 has no such spacing", "0.39 raises ValueError", "0.39 raises ValueError",
    *of(["FlaxEulerDiscreteScheduler"], "set_timesteps: trailing", "scale_model_input: trailing", "step: trailing"),
)  # fmt: skip
known(
    "0.39 takes the timestep for its place, and mixes the derivatives' values",
    "other numbers", "other numbers", *of(["FlaxLMSDiscreteScheduler"], "step$", "step: SD", "step: v"),
)  # fmt: skip
known(
    "0.39's step cannot be compiled", "0.39 raises TracerBoolConversionError",
    "0.39 raises TracerBoolConversionError", "FlaxLMSDiscreteScheduler.step: an output",
)  # fmt: skip
known(
    "ends at σ = 0, as PyTorch's; 0.39 at timestep 0, as configs that it wrote do here",
    "other numbers", "other numbers",
    *of([DPM], *(f"step{variant}$" for variant in (
        "", ": SD", ": v", ": sample", ": order 1", ": order 3", ": heun", ": no lower order at the end", ": trailing",
    ))),
)  # fmt: skip
known(
    "0.39 thresholds a batch of one only", "0.39 raises ValueError", "0.39 raises ValueError",
    f"{DPM}.step: thresholding",
)  # fmt: skip
known(
    "0.39 reads a key that its config has not", "0.39 raises AttributeError", "0.39 raises AttributeError",
    *of([DPM], "set_timesteps: leading", "scale_model_input: leading", "step: leading"),
)  # fmt: skip
known(
    "0.39 draws by an array of keys, which JAX refuses", "0.39 raises ValueError", "0.39 raises ValueError",
    "FlaxKarrasVeScheduler.add_noise_to_input", "FlaxScoreSdeVeScheduler.step_correct",
)  # fmt: skip
known(
    "0.39 calls a method of PyTorch's tensors", "0.39 raises AttributeError", "0.39 raises AttributeError",
    "FlaxScoreSdeVeScheduler.step_pred",
)  # fmt: skip

known(
    "files are safetensors, which PyTorch's classes read too; 0.39's and 4.57's are read as well",
    "other values", "other values",
    *of((*MODELS, *TRANSFORMERS[:4]), "save_pretrained: names of files"),
)  # fmt: skip
known(
    "files are safetensors, which PyTorch's classes read too; 0.39's and 4.57's are read as well",
    "0.39 raises TypeError", "other values", *of(TRANSFORMERS[4:], "save_pretrained: names of files"),
)  # fmt: skip
known(
    "the autoencoder's attention has the names of PyTorch's class today; 0.39's are read",
    "other values", "other values", "FlaxAutoencoderKL.from_pretrained: names of parameters",
)  # fmt: skip
known(
    "0.39 fails where return_dict is False", "0.39 raises AttributeError", "0.39 raises AttributeError",
    "FlaxAutoencoderKL.__call__: a tuple",
)  # fmt: skip
known(
    "4.57 has the method without its content", "0.39 raises NotImplementedError", "0.39 raises NotImplementedError",
    *of(TRANSFORMERS[:4], "enable_gradient_checkpointing"),
)  # fmt: skip
known(
    "4.57 has the method without its content", "0.39 raises TypeError", "0.39 raises NotImplementedError",
    "FlaxStableDiffusionSafetyChecker.enable_gradient_checkpointing",
)  # fmt: skip
known(
    "a key of dropout makes another mask in modules of other names",
    "other numbers", "other numbers", "FlaxUNet2DConditionModel.__call__: train, the same dropout",
)  # fmt: skip
known(
    "a size need be a multiple of the autoencoder's factor alone; 0.39 wants one of 8",
    "0.39 raises ValueError", "0.39 raises ValueError",
    *of(("FlaxStableDiffusionPipeline", "FlaxStableDiffusionXLPipeline"), "__call__: a height that 8"),
)  # fmt: skip
WITH_CHECKER = PIPELINES[:4]
known(
    "0.39 guides one prompt at a time without jit", "0.39 raises ValueError", "0.39 raises ValueError",
    *of(WITH_CHECKER, "__call__: one device, two prompts"),
)  # fmt: skip
known(
    "files are safetensors, which PyTorch's classes read too; 0.39's and 4.57's are read as well",
    "other leaves", "other leaves", *of(PIPELINES, "save_pretrained: names of files"),
)  # fmt: skip
known(
    "PyTorch's class has no sample_size and no dropout, so its config.json has not either",
    "ours raises KeyError", "ours raises KeyError", "FlaxControlNetModel.save_config",
)  # fmt: skip
known(
    "PyTorch's class has no sample_size and no dropout, so its config.json has not either",
    "other values", "other values", "FlaxControlNetModel.save_pretrained$",
)  # fmt: skip
known(
    "0.39 scales the first noise by the level of all timesteps, not of those that are drawn",
    "other numbers", "other numbers", "FlaxStableDiffusionPipeline.__call__: Euler, leading",
)  # fmt: skip
TEXT_TO_IMAGE = ("FlaxStableDiffusionPipeline", "FlaxStableDiffusionXLPipeline")
known(
    "0.39 rounds timesteps to integers, and then finds no noise level", "other numbers", "other numbers",
    *of(TEXT_TO_IMAGE, "__call__: FlaxEulerDiscreteScheduler"),
)  # fmt: skip
known(
    "0.39's step cannot be compiled", "0.39 raises TracerBoolConversionError",
    "0.39 raises TracerBoolConversionError", *of(TEXT_TO_IMAGE, "__call__: FlaxLMSDiscreteScheduler"),
)  # fmt: skip
known(
    "draws new noise in every step; 0.39 the same in all", "other numbers", "other numbers",
    *of(TEXT_TO_IMAGE, "__call__: FlaxDDPMScheduler"),
)  # fmt: skip
known(
    OLD_NAMES, "0.39 raises TypeError", SAME,
    *of(WITH_CHECKER, "from_pretrained: with the safety checker"),
    *of((*WITH_CHECKER[:1], *WITH_CHECKER[2:]), "__call__: jit, with the safety checker"),
)  # fmt: skip
known(
    "0.39 cannot write black into what it has drawn", "0.39 raises TypeError", "0.39 raises ValueError",
    "FlaxStableDiffusionImg2ImgPipeline.__call__: jit, with the safety checker",
)  # fmt: skip
known(
    "0.39 shapes pictures for several devices, where there is one", "0.39 raises TypeError", "0.39 raises ValueError",
    *of(WITH_CHECKER, "__call__: one device, with the safety checker"),
)  # fmt: skip

ABSENT = {
    "can_generate": "no encoder generates",
    "generate": "no encoder generates",
    "prepare_inputs_for_generation": "no encoder generates",
    "encode": "of T5's encoder and decoder together",
    "decode": "of T5's decoder, which T5's encoder has not",
    "init_cache": "of T5's decoder, which T5's encoder has not",
    "load_flax_weights": "from_pretrained reads the files",
    "load_flax_sharded_weights": "from_pretrained reads the files",
    "register_for_auto_class": "there are no auto classes for code of others",
    "extract_init_dict": "within from_config",
    "get_config_dict": "an old name of load_config",
    "register_to_config": "within the constructor",
    "register_modules": "within the constructor",
    "push_to_hub": "save_pretrained with push_to_hub=True; without parameters, 0.39's method fails",
    "from_config": "of pipelines: their constructor",
    "load_config": "of pipelines: from_pretrained reads it",
    "save_config": "of pipelines: save_pretrained writes it",
    "to_json_string": "of pipelines: json.dumps(pipeline.config)",
    "to_json_file": "of pipelines: save_pretrained writes it",
    "convert_model_output": "within step",
    "dpm_solver_first_order_update": "within step",
    "multistep_dpm_solver_second_order_update": "within step",
    "multistep_dpm_solver_third_order_update": "within step",
    "step_plms": "within step, which chooses between the two",
    "step_prk": "within step, which chooses between the two",
}
"""Public methods of 0.39's classes that the classes here have not, and what there is instead."""

NOT_CALLED = {"push_to_hub": "needs the Hub; tested with a Hub of the tests' own"}
"""Methods that both have and that no call is made of."""

"""Calls of the schedulers: states, whole trajectories, noise, configurations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from registry import call, normal

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = SD | {"prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FEW = {"num_train_timesteps": 8, "beta_start": 0.05, "beta_end": 0.3}
VARIANTS = {
    "FlaxDDIMScheduler": {
        "": {}, "SD": SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, "v": V,
        "sample": {"prediction_type": "sample", "clip_sample_range": 0.5}, "cosine": COSINE,
        "trained_betas": {"trained_betas": np.linspace(1e-4, 0.02, 1000, dtype=np.float32)},
    },
    "FlaxDDPMScheduler": {
        "": {}, "SD": SD | {"clip_sample": False}, "v": V, "sample": {"prediction_type": "sample"},
        "as many steps as trained": FEW,
        "as many steps as trained, fixed_large": FEW | {"variance_type": "fixed_large"},
        "fixed_large": {"variance_type": "fixed_large"}, "fixed_small_log": {"variance_type": "fixed_small_log"},
        "fixed_large_log": {"variance_type": "fixed_large_log"}, "learned": {"variance_type": "learned"},
        "learned_range": {"variance_type": "learned_range"},
    },
    "FlaxPNDMScheduler": {
        "": {}, "SD": SD | {"skip_prk_steps": True, "steps_offset": 1}, "v": V | {"skip_prk_steps": True},
        "SD with Runge-Kutta": SD | {"set_alpha_to_one": True},
    },
    "FlaxEulerDiscreteScheduler": {
        "": {}, "SD": SD, "v": V, "leading": SD | {"timestep_spacing": "leading"},
        "trailing": SD | {"timestep_spacing": "trailing"},
    },
    "FlaxLMSDiscreteScheduler": {"": {}, "SD": SD, "v": V},
    "FlaxDPMSolverMultistepScheduler": {
        "": {}, "SD": SD, "v": V, "sample": {"prediction_type": "sample"}, "order 1": SD | {"solver_order": 1},
        "order 3": SD | {"solver_order": 3}, "heun": SD | {"solver_type": "heun"},
        "dpmsolver": SD | {"algorithm_type": "dpmsolver"}, "thresholding": {"thresholding": True},
        "no lower order at the end": SD | {"lower_order_final": False},
        "dpmsolver, order 3": SD | {"algorithm_type": "dpmsolver", "solver_order": 3},
        "leading": SD | {"timestep_spacing": "leading"}, "trailing": SD | {"timestep_spacing": "trailing"},
    },
}  # fmt: skip
VE = {"FlaxKarrasVeScheduler": {"s_churn": 40.0}, "FlaxScoreSdeVeScheduler": {"num_train_timesteps": 20}}
WITH_SIGMAS = ("FlaxEulerDiscreteScheduler", "FlaxLMSDiscreteScheduler")
SHAPE = (2, 3, 4, 4)
STEPS = 8


def named(name, method, variant):
    return f"{name}.{method}" + (f": {variant}" if variant else "")


def fields(state, *names):
    return {name: getattr(state, name) for name in names}


def walk(scheduler, state, *extra):
    """Every sample of a trajectory, by the loop of the pipelines outside of jit."""
    sample, found = normal(0, *SHAPE) * state.init_noise_sigma, []
    for number, t in enumerate(np.asarray(state.timesteps)):
        scaled = scheduler.scale_model_input(state, sample, t)
        predicted = 0.1 * scaled + 0.3 * normal(number, *SHAPE)
        if str(scheduler.config.get("variance_type")).startswith("learned"):
            predicted = jnp.concatenate([predicted, jnp.tanh(predicted)], axis=1)
        sample, state = scheduler.step(state, predicted, t, sample, *extra, return_dict=False)
        found.append(sample)
    return found


def of_a_sampler(name, variant, config):
    """States, trajectories and noise of one configuration."""

    times = np.array([3, 700 * config.get("num_train_timesteps", 1000) // 1000])

    def made(package):
        return getattr(package, name)(**config)

    def set_up(package):
        scheduler = made(package)
        return scheduler, scheduler.set_timesteps(scheduler.create_state(), STEPS, SHAPE)

    @call(named(name, "create_state", variant))
    def _(package):
        state = made(package).create_state()
        return fields(state, "init_noise_sigma", "timesteps", "num_inference_steps"), fields(
            state.common, "alphas", "betas", "alphas_cumprod"
        )

    @call(named(name, "set_timesteps", variant))
    def _(package):
        scheduler, state = set_up(package)
        odd = scheduler.set_timesteps(scheduler.create_state(), num_inference_steps=7, shape=SHAPE)
        found = [fields(one, "timesteps", "init_noise_sigma", "num_inference_steps") for one in (state, odd)]
        return found, [one.sigmas for one in (state, odd) if name in WITH_SIGMAS]

    @call(named(name, "scale_model_input", variant))
    def _(package):
        scheduler, state = set_up(package)
        return [scheduler.scale_model_input(state, normal(0, *SHAPE), t) for t in np.asarray(state.timesteps)]

    @call(named(name, "step", variant))
    def _(package):
        extra = (jax.random.PRNGKey(4),) if name == "FlaxDDPMScheduler" else ()
        return walk(*set_up(package), *extra)

    if name == "FlaxDPMSolverMultistepScheduler" and "spacing" not in "".join(config):

        @call(f"{name}.step: {variant or 'plain'}, by a config that 0.39 wrote")
        def _(package):
            scheduler = getattr(package, name).from_config({"_class_name": name, **config})
            return walk(scheduler, scheduler.set_timesteps(scheduler.create_state(), STEPS, SHAPE))

    @call(named(name, "add_noise", variant))
    def _(package):
        state = made(package).create_state()
        return made(package).add_noise(state, normal(1, *SHAPE), normal(2, *SHAPE), times)


def of_a_class(name):
    """What does not depend on the configuration."""

    def made(package, **more):
        return getattr(package, name)(**SD | more)

    @call(f"{name}.step: an output with names, jitted")
    def _(package):
        scheduler = made(package)
        state = scheduler.set_timesteps(scheduler.create_state(), STEPS, SHAPE)
        extra = {"key": jax.random.PRNGKey(4)} if name == "FlaxDDPMScheduler" else {}

        def step(sample):
            return scheduler.step(state, 0.3 * sample, state.timesteps[0], sample, **extra).prev_sample

        return jax.jit(step)(normal(0, *SHAPE))

    @call(f"{name}.from_config: of another class")
    def _(package):
        first = package.FlaxDDIMScheduler(**V, num_train_timesteps=500)
        return getattr(package, name).from_config(first.config).config["num_train_timesteps"]

    @call(f"{name}.step: no set_timesteps before")
    def _(package):
        scheduler = made(package)
        return scheduler.step(scheduler.create_state(), normal(0, *SHAPE), 999, normal(1, *SHAPE)).prev_sample

    @call(f"{name}.step: an unknown prediction_type")
    def _(package):
        scheduler = made(package, prediction_type="noise")
        state = scheduler.set_timesteps(scheduler.create_state(), STEPS, SHAPE)
        return scheduler.step(state, normal(0, *SHAPE), state.timesteps[0], normal(1, *SHAPE)).prev_sample

    @call(f"{name}.get_velocity")
    def _(package):
        scheduler = made(package)
        times = jnp.array([3, 700])
        return scheduler.get_velocity(scheduler.create_state(), normal(1, *SHAPE), normal(2, *SHAPE), times)

    @call(f"{name}.create_state: common")
    def _(package):
        scheduler = made(package)
        return scheduler.create_state(package.CommonSchedulerState.create(scheduler)).common.alphas_cumprod

    @call(f"{name}.create_state: an unknown beta_schedule")
    def _(package):
        return made(package, beta_schedule="circular").create_state().common.betas


def of_every_class(name, config):
    """Configurations, as `ConfigMixin` reads and writes them."""

    def kept(scheduler):
        length = 0 if name == "FlaxKarrasVeScheduler" else len(scheduler)
        return {key: scheduler.config[key] for key in config}, length

    @call(f"{name}.from_config")
    def _(package):
        cls = getattr(package, name)
        first = cls(**config)
        again, unused = cls.from_config(first.config, return_unused_kwargs=True, other=3)
        return kept(again), unused, kept(cls.from_config(dict(config)))

    @call(f"{name}.save_pretrained")
    def _(package):
        cls, new = getattr(package, name), package.new_folder()
        cls(**config).save_pretrained(new)
        scheduler, state = cls.from_pretrained(new)
        return sorted(path.name for path in new.iterdir()), kept(scheduler), type(state).__name__

    @call(f"{name}.from_pretrained")
    def _(package):
        cls, new = getattr(package, name), package.new_folder()
        cls(**config).save_config(new / "scheduler")
        scheduler, state, unused = cls.from_pretrained(
            str(new), subfolder="scheduler", return_unused_kwargs=True, other=3
        )
        return kept(scheduler), type(state).__name__, {key: unused[key] for key in unused if key[0] != "_"}

    @call(f"{name}.from_pretrained: no such folder")
    def _(package):
        return getattr(package, name).from_pretrained(str(package.folder / "nothing"))

    @call(f"{name}.load_config")
    def _(package):
        cls, new = getattr(package, name), package.new_folder()
        cls(**config).save_config(new)
        read = cls.load_config(str(new))
        return {key: read[key] for key in config}

    @call(f"{name}.to_json_string")
    def _(package):
        read = json.loads(getattr(package, name)(**config).to_json_string())
        return {key: read[key] for key in ("_class_name", *config)}

    @call(f"{name}.to_json_file")
    def _(package):
        file = package.new_folder() / "any.json"
        getattr(package, name)(**config).to_json_file(file)
        read = json.loads(file.read_text())
        return {key: read[key] for key in config}

    @call(f"{name}.save_config")
    def _(package):
        new = package.new_folder()
        getattr(package, name)(**config).save_config(new)
        return sorted(path.name for path in new.iterdir())

    @call(f"{name}.compatibles")
    def _(package):
        scheduler = getattr(package, name)(**config)
        return sorted(cls.__name__ for cls in scheduler.compatibles), scheduler.has_state


for _name, _variants in VARIANTS.items():
    of_a_class(_name)
    of_every_class(_name, V | {"num_train_timesteps": 500})
    for _variant, _config in _variants.items():
        of_a_sampler(_name, _variant, _config)
for _name, _config in VE.items():
    of_every_class(_name, _config)


@call("FlaxDDIMScheduler.step: eta")
def _(package):
    scheduler = package.FlaxDDIMScheduler(**SD)
    state = scheduler.set_timesteps(scheduler.create_state(), STEPS)
    return walk(scheduler, state, 0.5)


@call("FlaxDDPMScheduler.step: no key")
def _(package):
    scheduler = package.FlaxDDPMScheduler(**SD, variance_type="fixed_large")
    return walk(scheduler, scheduler.set_timesteps(scheduler.create_state(), STEPS))


@call("FlaxLMSDiscreteScheduler.get_lms_coefficient")
def _(package):
    scheduler = package.FlaxLMSDiscreteScheduler(**SD)
    state = scheduler.set_timesteps(scheduler.create_state(), STEPS, SHAPE)
    return [np.float32(scheduler.get_lms_coefficient(state, 4, 5, current)) + np.zeros(1, "f4") for current in range(4)]


def exploding(package, name, **more):
    scheduler = getattr(package, name)(**VE[name] | more)
    return scheduler, scheduler.set_timesteps(scheduler.create_state(), STEPS)


@call("FlaxKarrasVeScheduler.set_timesteps")
def _(package):
    _, state = exploding(package, "FlaxKarrasVeScheduler")
    return fields(state, "timesteps", "schedule", "num_inference_steps")


@call("FlaxKarrasVeScheduler.create_state")
def _(package):
    return fields(package.FlaxKarrasVeScheduler().create_state(), "timesteps", "schedule", "num_inference_steps")


@call("FlaxKarrasVeScheduler.add_noise_to_input")
def _(package):
    scheduler, state = exploding(package, "FlaxKarrasVeScheduler")
    sample, sigma = scheduler.add_noise_to_input(state, normal(0, *SHAPE), 3.0, jax.random.PRNGKey(0))
    return sample, float(sigma)


@call("FlaxKarrasVeScheduler.step")
def _(package):
    scheduler, state = exploding(package, "FlaxKarrasVeScheduler")
    return scheduler.step(state, normal(1, *SHAPE), 3.0, 2.0, normal(0, *SHAPE), return_dict=False)[:2]


@call("FlaxKarrasVeScheduler.step_correct")
def _(package):
    scheduler, state = exploding(package, "FlaxKarrasVeScheduler")
    first = scheduler.step(state, normal(1, *SHAPE), 3.0, 2.0, normal(0, *SHAPE))
    second = scheduler.step_correct(
        state, normal(2, *SHAPE), 3.0, 2.0, normal(0, *SHAPE), first.prev_sample, first.derivative
    )
    return second.prev_sample, second.derivative


@call("FlaxKarrasVeScheduler.add_noise")
def _(package):
    scheduler, state = exploding(package, "FlaxKarrasVeScheduler")
    return scheduler.add_noise(state, normal(0, *SHAPE), normal(1, *SHAPE), jnp.array([1, 2]))


@call("FlaxScoreSdeVeScheduler.create_state")
def _(package):
    return fields(exploding(package, "FlaxScoreSdeVeScheduler")[0].create_state(), "discrete_sigmas", "sigmas")


@call("FlaxScoreSdeVeScheduler.set_timesteps")
def _(package):
    scheduler, state = exploding(package, "FlaxScoreSdeVeScheduler")
    return state.timesteps, scheduler.set_timesteps(state, 5, sampling_eps=0.01).timesteps


@call("FlaxScoreSdeVeScheduler.set_sigmas")
def _(package):
    scheduler, state = exploding(package, "FlaxScoreSdeVeScheduler")
    given = scheduler.set_sigmas(state, STEPS, 0.02, 50.0, 1e-4)
    return [fields(one, "discrete_sigmas", "sigmas") for one in (scheduler.set_sigmas(state, STEPS), given)]


@call("FlaxScoreSdeVeScheduler.get_adjacent_sigma")
def _(package):
    scheduler, state = exploding(package, "FlaxScoreSdeVeScheduler")
    return scheduler.get_adjacent_sigma(state, jnp.array([0, 3]), jnp.array([0.0, 0.5]))


@call("FlaxScoreSdeVeScheduler.step_pred")
def _(package):
    scheduler, state = exploding(package, "FlaxScoreSdeVeScheduler")
    found = scheduler.step_pred(state, normal(1, *SHAPE), 0.5, normal(0, *SHAPE), jax.random.PRNGKey(0))
    return found.prev_sample, found.prev_sample_mean


@call("FlaxScoreSdeVeScheduler.step_correct")
def _(package):
    scheduler, state = exploding(package, "FlaxScoreSdeVeScheduler")
    return scheduler.step_correct(state, normal(1, *SHAPE), normal(0, *SHAPE), jax.random.PRNGKey(0)).prev_sample


@call("FlaxScoreSdeVeScheduler.scale_model_input")
def _(package):
    scheduler, state = exploding(package, "FlaxScoreSdeVeScheduler")
    return scheduler.scale_model_input(state, normal(0, *SHAPE), 0.5)

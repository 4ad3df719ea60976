"""What an example carries of its objective, against Diffusers' schedulers."""

import pickle

import diffusers
import numpy as np
import pytest
import torch
from torch_reference import exact_roots

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives.ddpm import Ddpm, ddpm
from flax_diffusion.core.objectives.edm import Edm
from flax_diffusion.core.objectives.flow_matching import FlowMatching
from flax_diffusion.core.objectives.objective import OBJECTIVES, check_options, objective_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig

T = 1000
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_input_and_target_of_every_timestep(schedule, prediction_type, dtype):
    """What Diffusers computes on the same numbers: bit for bit in float32, where its roots can be rounded correctly."""
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule)
    kind = torch.float32 if dtype == np.float32 else torch.float64
    theirs.alphas_cumprod = theirs.alphas_cumprod.to(kind)
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, T, 3)).astype(dtype)
    one = ddpm(theirs.alphas_cumprod.numpy(), prediction_type, dtype=dtype).tables
    tensors = torch.from_numpy(clean), torch.from_numpy(noise), torch.arange(T)
    with exact_roots():
        noisy, velocity = theirs.add_noise(*tensors), theirs.get_velocity(*tensors)
    target = {"epsilon": tensors[1], "sample": tensors[0], "v_prediction": velocity}[prediction_type]
    for ours, expected in (
        (one.input_clean[:, None] * clean + one.input_noise[:, None] * noise, noisy),
        (one.target_clean[:, None] * clean + one.target_noise[:, None] * noise, target),
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=0 if dtype == np.float32 else 1e-15)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_clean_sample_comes_back(prediction_type):
    """From input and target, wherever there is signal and noise: x = (d · input - b · target) / (a · d - b · c)."""
    bar = np.linspace(0.99, 0.01, 50)
    a, b, c, d = ddpm(bar, prediction_type, dtype=np.float64).tables[1:5]
    x, noise = np.random.default_rng(0).standard_normal((2, 50))
    np.testing.assert_allclose((d * (a * x + b * noise) - b * (c * x + d * noise)) / (a * d - b * c), x, atol=1e-12)


def test_a_draw_is_a_row_of_the_tables():
    objective = pickle.loads(pickle.dumps(ddpm(np.linspace(0.9, 0.1, 5), "v_prediction", np.arange(5) / 7)))  # noqa: S301
    drawn = [objective.draw(np.random.default_rng(seed)) for seed in range(50)]
    assert {int(one.timesteps) for one in drawn} == set(range(5))
    for one in drawn:
        assert [value.shape for value in one] == [()] * 6
        assert [value.dtype.name for value in one] == ["int32", *["float32"] * 5]
        for value, table in zip(one, objective.tables, strict=True):
            assert value == table[one.timesteps]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="prediction_type 'velocity' is unknown; use one of epsilon, v_pred"):
        ddpm(np.ones(3), "velocity")
    with pytest.raises(ValueError, match=r"loss_weights has shape \(999,\); it must be \(1000,\)"):
        ddpm(np.ones(1000), "epsilon", np.ones(999))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.999, 1.0])
def test_flow_matching_mixes_as_diffusers(t):
    """`scale_noise` at σ = t, and the velocity that its sampler takes."""
    mixture = FlowMatching(dtype=np.float64).at(t)
    assert [float(value) for value in mixture] == [1000 * t, 1 - t, t, -1, 1, 1]


@pytest.mark.parametrize(
    ("options", "quantiles"),
    [
        ({}, [0.25, 0.5, 0.75]),
        ({"shift": 3.0}, [3 * t / (1 + 2 * t) for t in (0.25, 0.5, 0.75)]),
        ({"logit_normal": (0.0, 1.0)}, [1 / (1 + np.exp(-z)) for z in (-0.67449, 0, 0.67449)]),
        ({"logit_normal": (0.5, 0.6)}, [1 / (1 + np.exp(-(0.5 + 0.6 * z))) for z in (-0.67449, 0, 0.67449)]),
    ],
)
def test_how_flow_matching_draws_its_time(options, quantiles):
    rng = np.random.default_rng(0)
    drawn = [float(FlowMatching(**options).draw(rng).timesteps) / 1000 for _ in range(20_000)]
    np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75]), quantiles, atol=0.012)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_edm_preconditions_as_diffusers(sigma):
    theirs, level = diffusers.EDMEulerScheduler(), torch.tensor(sigma, dtype=torch.float64)
    mixture = Edm(dtype=np.float64).at(sigma)
    x, noise = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 4))
    sample = torch.from_numpy(x + sigma * noise)
    given = mixture.input_clean * x + mixture.input_noise * noise
    np.testing.assert_allclose(given, theirs.precondition_inputs(sample, level), rtol=1e-12)
    target = torch.from_numpy(mixture.target_clean * x + mixture.target_noise * noise)
    denoised = theirs.precondition_outputs(sample, target, level)
    np.testing.assert_allclose(denoised, x, atol=1e-12)
    np.testing.assert_allclose(mixture.timesteps, theirs.precondition_noise(level), rtol=1e-12)


def test_how_edm_draws_its_level():
    rng = np.random.default_rng(0)
    logs = np.array([4 * float(Edm().draw(rng).timesteps) for _ in range(20_000)])
    assert abs(logs.mean() + 1.2) < 0.04
    assert abs(logs.std() - 1.2) < 0.03


@pytest.mark.parametrize("objective", [Edm(), Edm(sigma_data=1.0)])
def test_edm_input_and_target_have_unit_variance(objective):
    """Of data whose standard deviation is σ_data; the reason for the four numbers (appendix B.6)."""
    for sigma in (0.01, 0.5, 20.0):
        m = objective.at(sigma)
        for clean, noise in ((m.input_clean, m.input_noise), (m.target_clean, m.target_noise)):
            assert (clean * objective.sigma_data) ** 2 + noise**2 == pytest.approx(1, rel=1e-5)


def made(scheduler, **options):
    """The objective of a scheduler config, with a run's options."""
    config = UnconditionalConfig(dataset_name="digits", **options)
    return objective_of(scheduler).from_scheduler(scheduler, config)


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("scheduler", "options", "expected"),
    [
        (FLOW, {}, FlowMatching()),
        (FLOW | {"shift": 3.0, "num_train_timesteps": 10}, {}, FlowMatching(shift=3.0, num_train_timesteps=10)),
        (FLOW | {"shift": 3.0, "use_dynamic_shifting": True}, {}, FlowMatching()),
        (FLOW, {"weighting_scheme": "logit_normal"}, FlowMatching(logit_normal=(0.0, 1.0))),
        (
            FLOW, {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5},
            FlowMatching(logit_normal=(1.0, 0.5)),
        ),
        ({"_class_name": "EDMEulerScheduler"}, {}, Edm()),
        (
            {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, {"edm_log_mean": 0.0, "edm_log_std": 0.5},
            Edm(sigma_data=1.0, log_mean=0.0, log_std=0.5),
        ),
    ],
)  # fmt: skip
def test_an_objective_comes_from_the_scheduler_and_the_options(scheduler, options, expected):
    assert made(scheduler, **options) == expected


@pytest.mark.parametrize(
    ("scheduler", "options", "says"),
    [
        (FLOW | {"shift": 0.0}, {}, r"shift is 0\.0; it must be greater than 0"),
        (FLOW | {"shift": "big"}, {}, "scheduler config: shift is 'big'; it must be"),
        (FLOW | {"invert_sigmas": True}, {}, "invert_sigmas counts time backwards"),
        (FLOW, {"logit_std": 2.0}, "--logit_std goes with --weighting_scheme logit_normal: add it"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": -1.0}, {}, r"sigma_data is -1\.0; it must be greater"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, {}, "'v_prediction' is unknown"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, {}, "not among those whose models train here"),
    ],
)
def test_what_no_objective_takes(scheduler, options, says):
    with pytest.raises(ConfigError, match=says):
        made(scheduler, **options)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "flow_matching",
            {"snr_gamma": 5.0},
            "--snr_gamma goes with --objective ddpm, and this model is trained by flow",
        ),
        ("edm", {"prediction_type": "sample"}, "--prediction_type goes with --objective ddpm"),
        ("ddpm", {"shift": 3.0}, "--shift goes with --objective flow_matching, and this model is trained by ddpm"),
        ("flow_matching", {"edm_log_std": 1.0}, "--edm_log_std goes with --objective edm"),
    ],
)
def test_options_of_other_objectives_are_refused(name, options, says):
    with pytest.raises(ConfigError, match=says):
        check_options(OBJECTIVES[name], UnconditionalConfig(dataset_name="digits", **options))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_whole(name):
    """Its new scheduler is its own, what it draws has a clean sample that comes back, and it can be pickled."""
    config = UnconditionalConfig(dataset_name="digits")
    scheduler = OBJECTIVES[name].scheduler(config)
    assert objective_of(scheduler) is OBJECTIVES[name]
    assert OBJECTIVES[name].changed(scheduler, config).items() >= scheduler.items()
    objective = pickle.loads(pickle.dumps(made(scheduler)))  # noqa: S301
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, 3, 4, 4))
    for _ in range(20):
        mixture = objective.draw(rng)
        assert all(np.shape(value) == () for value in mixture)
        given = mixture.input_clean * x + mixture.input_noise * noise
        predicted = mixture.target_clean * x + mixture.target_noise * noise
        if abs(mixture.input_clean) > 0.05:
            np.testing.assert_allclose(mixture.clean(given, predicted), x, rtol=1e-4, atol=1e-4)


def test_ddpm_refuses_noise_that_says_nothing():
    scheduler = Ddpm.scheduler(UnconditionalConfig(dataset_name="digits")) | {"rescale_betas_zero_snr": True}
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr with prediction_type epsilon"):
        made(scheduler)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"timestep_bias_strategy": "earlier", "timestep_bias_portion": 0.2}, slice(0, 2)),
        ({"timestep_bias_strategy": "later"}, slice(8, 10)),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 3, "timestep_bias_end": 7}, slice(3, 7)),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 3}, slice(3, 10)),
    ],
)
def test_timesteps_that_are_drawn_more_often(options, more):
    objective = made(
        Ddpm.scheduler(UnconditionalConfig(dataset_name="digits", ddpm_num_steps=10)),
        **options, timestep_bias_multiplier=3.0,
    )  # fmt: skip
    weights = np.ones(10)
    weights[more] = 3
    rng = np.random.default_rng(0)
    counts = np.bincount([int(objective.draw(rng).timesteps) for _ in range(4000)], minlength=10)
    expected = 4000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"timestep_bias_multiplier": 2.0},
            "--timestep_bias_multiplier changes nothing with --timestep_bias_strategy no",
        ),
        ({"timestep_bias_strategy": "later", "timestep_bias_end": 5}, "--timestep_bias_end changes nothing with"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 1000},
            "1000 is not below --timestep_bias_end 1000",
        ),
        ({"timestep_bias_strategy": "range", "timestep_bias_multiplier": 0.0}, "timestep_bias_multiplier"),
        (
            {"timestep_bias_strategy": "earlier", "timestep_bias_portion": 1e-4, "timestep_bias_multiplier": 2.0},
            "none of the 1000 timesteps is drawn more often",
        ),
    ],
)
def test_timesteps_that_cannot_be_drawn_more_often(options, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        made(Ddpm.scheduler(UnconditionalConfig(dataset_name="digits")), **options)

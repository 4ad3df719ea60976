"""Models in Flax Linen, with the names, config keys and parameter names of their PyTorch counterparts."""

from flax_diffusion.models.autoencoder_kl import FlaxAutoencoderKL
from flax_diffusion.models.clip import FlaxCLIPModel, FlaxCLIPModule, FlaxCLIPPreTrainedModel
from flax_diffusion.models.clip_text import (
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxCLIPTextPreTrainedModel,
)
from flax_diffusion.models.clip_vision import FlaxCLIPVisionModel, FlaxCLIPVisionModule, FlaxCLIPVisionPreTrainedModel
from flax_diffusion.models.controlnet import FlaxControlNetModel
from flax_diffusion.models.dit import FlaxDiTTransformer2DModel
from flax_diffusion.models.modeling import PretrainedModel as FlaxModelMixin
from flax_diffusion.models.outputs import (
    FlaxAutoencoderKLOutput,
    FlaxControlNetOutput,
    FlaxDecoderOutput,
    FlaxDiagonalGaussianDistribution,
    FlaxTransformer2DModelOutput,
    FlaxUNet2DConditionOutput,
    FlaxUNet2DOutput,
)
from flax_diffusion.models.safety_checker import FlaxStableDiffusionSafetyChecker
from flax_diffusion.models.t5_encoder import FlaxT5EncoderModel, FlaxT5EncoderModule, FlaxT5PreTrainedModel
from flax_diffusion.models.transformers_face import FlaxPreTrainedModel
from flax_diffusion.models.transformers_outputs import (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxCLIPOutput,
    FlaxCLIPTextModelOutput,
)
from flax_diffusion.models.unet_2d import FlaxUNet2DModel
from flax_diffusion.models.unet_2d_condition import FlaxUNet2DConditionModel
from flax_diffusion.models.vae_flax import (
    FlaxAttentionBlock,
    FlaxDecoder,
    FlaxDownEncoderBlock2D,
    FlaxDownsample2D,
    FlaxEncoder,
    FlaxResnetBlock2D,
    FlaxUNetMidBlock2D,
    FlaxUpDecoderBlock2D,
    FlaxUpsample2D,
)

__all__ = [
    "FlaxAttentionBlock",
    "FlaxAutoencoderKL",
    "FlaxAutoencoderKLOutput",
    "FlaxBaseModelOutput",
    "FlaxBaseModelOutputWithPooling",
    "FlaxCLIPModel",
    "FlaxCLIPModule",
    "FlaxCLIPOutput",
    "FlaxCLIPPreTrainedModel",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelOutput",
    "FlaxCLIPTextModelWithProjection",
    "FlaxCLIPTextModelWithProjectionModule",
    "FlaxCLIPTextModule",
    "FlaxCLIPTextPreTrainedModel",
    "FlaxCLIPVisionModel",
    "FlaxCLIPVisionModule",
    "FlaxCLIPVisionPreTrainedModel",
    "FlaxControlNetModel",
    "FlaxControlNetOutput",
    "FlaxDecoder",
    "FlaxDecoderOutput",
    "FlaxDiTTransformer2DModel",
    "FlaxDiagonalGaussianDistribution",
    "FlaxDownEncoderBlock2D",
    "FlaxDownsample2D",
    "FlaxEncoder",
    "FlaxModelMixin",
    "FlaxPreTrainedModel",
    "FlaxResnetBlock2D",
    "FlaxStableDiffusionSafetyChecker",
    "FlaxT5EncoderModel",
    "FlaxT5EncoderModule",
    "FlaxT5PreTrainedModel",
    "FlaxTransformer2DModelOutput",
    "FlaxUNet2DConditionModel",
    "FlaxUNet2DConditionOutput",
    "FlaxUNet2DModel",
    "FlaxUNet2DOutput",
    "FlaxUNetMidBlock2D",
    "FlaxUpDecoderBlock2D",
    "FlaxUpsample2D",
]

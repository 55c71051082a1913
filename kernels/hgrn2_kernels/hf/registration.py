"""Registration of the HGRN2 classes with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hgrn2_kernels.hf.configuration import HGRN2Config
from hgrn2_kernels.hf.modeling import HGRN2ForCausalLM, HGRN2Model


def register(exist_ok: bool = False):
    """Make AutoConfig, AutoModel and AutoModelForCausalLM build the classes of this package for `hgrn2` models.

    Importing fla registers fla's classes under the same name, and replaces earlier ones without a word. So import fla
    first if you need both, and then call `register(exist_ok=True)`. Calling this function again does no harm.

    Args:
        exist_ok: whether to replace another package's classes.

    Raises:
        ValueError: another package has registered `hgrn2`, and exist_ok is False.
    """
    name = HGRN2Config.model_type
    registered = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None
    if registered not in (None, HGRN2Config) and not exist_ok:
        raise ValueError(
            f"the Auto classes already build {registered.__module__}.{registered.__name__} for models of the type "
            f"{name!r}: call register(exist_ok=True) to have them build the classes of hgrn2_kernels.hf instead, or "
            "use hgrn2_kernels.hf.HGRN2ForCausalLM.from_pretrained without registering"
        )
    AutoConfig.register(name, HGRN2Config, exist_ok=True)
    AutoModel.register(HGRN2Config, HGRN2Model, exist_ok=True)
    AutoModelForCausalLM.register(HGRN2Config, HGRN2ForCausalLM, exist_ok=True)

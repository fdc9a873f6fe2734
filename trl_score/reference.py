"""
The reference model of the KL penalties (Eqs. 2 to 4): the base model, in both stages. In full fine-tuning it is a frozen model of its
own, and with an adapter it is the model under the adapter. The checks refuse what would make it another model.
"""

from pathlib import Path

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from trl.trainer.utils import create_model_from_path, get_config_model_id

from .rollout import load_rollout_settings
from .score_config import SCoReConfig


logger = get_logger(__name__)

# In the config.json and score.json of a model that SCoRe trained: it is no base model any more.
TRAINED_FLAG = "score_trained"
# PEFT's initializations that subtract the new adapter from the base weights, or quantize them.
REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Largest KL of the first batch to the reference, nats per token. The same model on the same tokens twice differs by 0. Measured on
# the embedded model: 1e-5 for a DoRA adapter at its start in bfloat16, 3e-5 for bfloat16 against float32 weights, up to 9e-5 for
# bfloat16 in training mode against evaluation mode, 0 for LoRA in float32, bfloat16 and 4 bits, with dropout too. On the other
# side: 3e-5 for float32 weights that are off by 1 % of their spread, 6 for PiSSA, OLoRA and a merged adapter.
MAX_START_KL = {"float32": 1e-5, "half": 5e-3}


# --- before the model is loaded ---


def check_base(model: "str | PreTrainedModel | PeftModel", peft_config: PeftConfig | None, args: SCoReConfig):
    """
    The given model can be the reference: its adapter does not change it, TRL can read it from a folder, and SCoRe has not
    trained it.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to be added to it.
        args ([`SCoReConfig`]):
            Settings. With `beta=0` there is no reference, and nothing is checked.
    """
    if (
        isinstance(model, str)
        and Path(model, "adapter_config.json").exists()
        and not Path(model, "config.json").exists()
    ):
        raise ValueError(
            f"'{model}' is an adapter. To continue its run, resume it (`resume_from_checkpoint`). To train it further in a new run, "
            "pass `PeftModel.from_pretrained(base_model, folder, is_trainable=True)` as `model`, whose base model is the reference."
        )
    if args.beta == 0:
        return
    if peft_config is not None:
        check_adapter(peft_config)
    elif isinstance(model, PeftModel):
        if "default" not in model.peft_config:
            raise ValueError(
                f"The given adapter is named {', '.join(map(repr, model.peft_config))}, but TRL reads the one named 'default'. Load it "
                "without `adapter_name`."
            )
        for config in model.peft_config.values():
            check_adapter(config)
    elif not isinstance(model, str):
        _check_folder(model, args)
    if args.reference_model_name_or_path is not None:
        return
    config = None if isinstance(model, str) else model.config
    saved = {}  # beside the weights: an adapter is saved, and merged, without the configuration of its model
    if config is None:
        revision = (args.model_init_kwargs or {}).get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
        saved = load_rollout_settings(model, revision=revision)
    if getattr(config, TRAINED_FLAG, False) or saved.get(TRAINED_FLAG, False):
        raise ValueError(
            f"'{get_config_model_id(config) or model}' was trained by SCoRe, so it is not the base model that both stages "
            "hold to, and TRL would make it the reference. Train both stages in one run (`stage1_steps`), resume a run "
            "with `resume_from_checkpoint`, or set `reference_model_name_or_path` to the base model. If it is meant as the "
            f"base of a new run, remove `{TRAINED_FLAG}` from its config.json and score.json."
        )


def _check_folder(model: PreTrainedModel, args: SCoReConfig):
    """TRL makes the reference of a model object from the model's folder; [`set_reference`] then replaces its weights."""
    name = get_config_model_id(model.config)
    try:
        if not name:
            raise OSError("`config._name_or_path` is empty.")
        AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"The reference of a model that is passed as an object is made from the folder that it was loaded from, which was not "
            f"found ('{name}'). Save it with `model.save_pretrained` and `tokenizer.save_pretrained`, and pass the folder."
        ) from error


def check_adapter(config: PeftConfig):
    """
    The model under an adapter is the reference, so an adapter must neither rewrite nor train its weights, and has to begin with its
    outputs.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"`{type(config).__name__}` puts random virtual tokens before the prompt, so training would not begin at the reference of "
            "the KL penalties, the model without them. Use `LoraConfig`, or train without KL: `beta=0` and `stage1_beta=0`."
        )
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(REWRITING_INITS):
        raise ValueError(
            f"`init_lora_weights={init!r}` changes the weights under the adapter, but the model under the adapter is the reference "
            "of the KL penalties. Set it to True, 'gaussian' or 'eva'."
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError(
            "`kasa_config` takes the smallest singular components out of the weights under the adapter, but the model under the adapter "
            "is the reference of the KL penalties. Leave it out."
        )
    bias = getattr(config, "bias", "none")
    if bias not in ("none", False, None):
        raise ValueError(
            f"`bias={bias!r}` trains biases of the model under the adapter, but this model is the reference of the KL penalties. "
            "Set it to 'none'."
        )


# --- when TRL has loaded it ---


def check_shards(reference_model_name_or_path: str | None, is_sharded: bool):
    """A named reference is loaded as whole weights, which no process has if the model is sharded."""
    if reference_model_name_or_path is not None and is_sharded:
        raise ValueError(
            "`reference_model_name_or_path` loads whole weights into the reference model, which ZeRO-3 and FSDP shard. "
            "Start from the base model itself and leave it out, or train with DDP or ZeRO-2."
        )


def set_reference(model: nn.Module, reference: nn.Module | None, args: SCoReConfig, is_copied: bool):
    """
    Make the base model the reference.

    Args:
        model (`torch.nn.Module`):
            The policy.
        reference (`torch.nn.Module`, *optional*):
            TRL's reference model; `None` with an adapter, and with `beta=0`.
        args ([`SCoReConfig`]):
            Settings, of which `reference_model_name_or_path` names another reference.
        is_copied (`bool`):
            Whether the reference gets the policy's weights, which can differ from those in the policy's folder.

    Raises:
        `ValueError`: if a reference is named beside an adapter, or the policy has other weights than a model from its folder.
    """
    name = args.reference_model_name_or_path
    if isinstance(model, PeftModel):
        if name is not None:
            raise ValueError(
                "`reference_model_name_or_path` is for full fine-tuning: with an adapter the reference is the model "
                "under it. Leave it out."
            )
        if "ref" in model.peft_config:
            model.delete_adapter(
                "ref"
            )  # TRL's copy of the given adapter; without it TRL uses the model under the adapter
            logger.warning(
                "The given model carries an adapter. The reference of the KL penalties is the base model under it, as "
                "in both stages of the paper. If the adapter is part of your base model, merge it first."
            )
    elif reference is not None and name is not None:
        named = create_model_from_path(
            name, dtype=model.dtype, device_map=None, trust_remote_code=args.trust_remote_code
        )
        reference.load_state_dict(named.state_dict())
    elif reference is not None and is_copied:
        copy_weights(model, reference)


def copy_weights(model: nn.Module, reference: nn.Module):
    """
    Give the reference the weights of the policy. TRL read the reference from the folder that the policy came from, and the
    policy can have been changed since.

    Raises:
        `ValueError`: if the policy has other weights than a model from its folder.
    """
    vocabulary = model.get_input_embeddings().weight.size(0)
    if reference.get_input_embeddings().weight.size(0) != vocabulary:
        reference.resize_token_embeddings(vocabulary, mean_resizing=False)
    try:
        reference.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "The given model has other weights than its folder "
            f"('{get_config_model_id(model.config)}') names, so the reference cannot be made from there: layers were added, removed "
            "or resized. Save it with `model.save_pretrained` and pass the folder."
        ) from error


def check_reference_is_fixed(model: PeftModel):
    """With the adapter disabled, the output must not depend on any parameter that is trained."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = model.training
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    model.eval()
    try:
        with model.disable_adapter(), torch.enable_grad():
            for parameter in trained.values():  # PEFT freezes what it disables
                parameter.requires_grad_(True)
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum()
            gradients = [None] * len(trained)
            if output.requires_grad:
                gradients = torch.autograd.grad(output, list(trained.values()), allow_unused=True)
    finally:
        model.train(training)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
    moving = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
    if moving:
        raise ValueError(
            f"Training would move the reference: {len(moving)} trained parameters, such as '{moving[0]}', belong to the model "
            "under the adapter, and this model is the reference of the KL penalties. Freeze them "
            "(`parameter.requires_grad_(False)`), or use full fine-tuning without an adapter."
        )


# --- before the first update ---


def start_kl(policy: Tensor, reference: Tensor, scored: Tensor) -> Tensor:
    """
    KL of a policy to its reference on some tokens, as TRL estimates it.

    Args:
        policy, reference (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens.
        scored (`torch.Tensor` of shape `(B, T)`):
            Whether a token counts.

    Returns:
        `torch.Tensor` of shape `(2,)`: the sum of the KL, nats, and the number of tokens.
    """
    difference = (reference - policy).float()
    return torch.stack([((difference.exp() - difference - 1) * scored).sum(), scored.sum()])


def is_exact(model: nn.Module, args: SCoReConfig) -> bool:
    """Whether a model computes in float32, with weights that are not quantized."""
    is_half = args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16)
    return not is_half and getattr(model, "hf_quantizer", None) is None


def check_start(kl: float, is_float32: bool):
    """
    A fresh run starts from its reference: the KL of its first batch is 0 up to rounding.

    Args:
        kl (`float`):
            Mean KL of the first batch to the reference, nats per token.
        is_float32 (`bool`):
            [`is_exact`] of the model, which bounds the rounding.
    """
    limit = MAX_START_KL["float32" if is_float32 else "half"]
    if not kl <= limit:
        raise ValueError(
            f"Before the first update the KL to the reference is {kl:.3g} per token, not 0 (up to {limit:g} for rounding), so the "
            "reference is not the model that this run starts from. Check what changed either of them: an adapter that does not "
            "start at zero (`init_lora_weights`), or weights or a configuration that were edited after loading (save the model "
            "and pass its folder). An adapter that is already trained is passed as a `PeftModel`."
        )

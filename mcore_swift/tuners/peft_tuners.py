"""The settings of each of peft's tuners, from the flags of a command."""

from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]

_UNTIL_KNOWN = 1 << 60
"""AdaLoRA's number of steps before the run knows it (`Engine.begin`)."""
_FOURIER_SEED = 777
"""peft's default seed for the positions of the coefficients."""


def _lora(args: Any) -> Settings:
    return {
        "r": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "bias": args.lora_bias,
        "use_dora": args.use_dora,
        "use_rslora": args.use_rslora,
        "target_parameters": args.target_parameters or None,
        "init_lora_weights": True if args.init_weights == "true" else args.init_weights,
    }


def _adalora(args: Any) -> Settings:
    return {
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "target_r": args.adalora_target_r,
        "init_r": args.adalora_init_r,
        "tinit": args.adalora_tinit,
        "tfinal": args.adalora_tfinal,
        "deltaT": args.adalora_deltaT,
        "beta1": args.adalora_beta1,
        "beta2": args.adalora_beta2,
        "orth_reg_weight": args.adalora_orth_reg_weight,
        "total_step": _UNTIL_KNOWN,
    }


def _low_rank_product(args: Any) -> Settings:
    return {"r": args.lora_rank, "alpha": args.lora_alpha, "module_dropout": args.lora_dropout}


def _oft(args: Any) -> Settings:
    return {"oft_block_size": args.oft_block_size, "module_dropout": args.lora_dropout}


def _boft(args: Any) -> Settings:
    return {
        "boft_block_size": 0 if args.boft_block_num > 0 else args.boft_block_size,
        "boft_block_num": args.boft_block_num,
        "boft_n_butterfly_factor": args.boft_n_butterfly_factor,
        "boft_dropout": args.boft_dropout,
    }


def _vera(args: Any) -> Settings:
    return {
        "r": args.vera_rank,
        "projection_prng_key": args.vera_projection_prng_key,
        "vera_dropout": args.vera_dropout,
        "d_initial": args.vera_d_initial,
    }


def _fourierft(args: Any) -> Settings:
    return {
        "n_frequency": args.fourier_n_frequency,
        "scaling": args.fourier_scaling,
        "random_loc_seed": _FOURIER_SEED,
    }


def _ia3(args: Any) -> Settings:
    return {"feedforward_modules": []}


_TUNERS: dict[str, tuple[str, Callable[[Any], Settings]]] = {
    "lora": ("LoraConfig", _lora),
    "adalora": ("AdaLoraConfig", _adalora),
    "loha": ("LoHaConfig", _low_rank_product),
    "lokr": ("LoKrConfig", _low_rank_product),
    "oft": ("OFTConfig", _oft),
    "boft": ("BOFTConfig", _boft),
    "vera": ("VeraConfig", _vera),
    "ia3": ("IA3Config", _ia3),
    "fourierft": ("FourierFTConfig", _fourierft),
}
"""Value of --tuner_type -> peft's class, and its settings."""


def peft_config(args: Any, **common: Any) -> Any:
    """peft's config for `args.tuner_type`. common: settings that all tuners have, such as target_modules."""
    import peft

    name, settings = _TUNERS[args.tuner_type]
    return getattr(peft, name)(**common, **settings(args))

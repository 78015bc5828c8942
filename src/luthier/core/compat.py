"""Keys that users of LLaMA-Factory and of older transformers bring along and that no part of Luthier owns yet.

A key here is never unknown: at a value that changes nothing it is accepted in silence, at any other the run stops
and says what to do instead. An owner's field of the same name takes over once it exists; a test holds the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.core.kinds import is_true


@dataclass(frozen=True)
class Refused:
    """A key that is known, and the values of it that ask for nothing Luthier does not do."""

    accepts: tuple[Any, ...]
    why: str
    """Completes `KEY: ...`: why, and what to do instead."""
    idle: bool = False
    """Other values are no reason to stop, since the model comes out the same: the run says that they have no effect."""

    def takes(self, value: Any) -> bool:
        """Whether this value may stand in the file."""
        return any(_same(value, accepted) for accepted in self.accepts)


@dataclass(frozen=True)
class Renamed:
    """An old name of an owned key."""

    new: str
    convert: Callable[[Any], Any] = lambda value: value
    """Turns the old value into the new key's; raises ValueError with words for the user."""
    yields: bool = False
    """With both names set the new one wins unless it is 0, as it did where the old name comes from."""


def _same(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, bool):
        return value is accepted or (isinstance(value, str) and value.strip().lower() == str(accepted).lower())
    if isinstance(accepted, (int, float)) and not isinstance(value, bool):
        try:
            return float(value) == float(accepted)
        except (TypeError, ValueError, OverflowError):
            return False
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)


def _ratio(value: Any) -> float:
    try:
        ratio = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number from 0 up to, but not including, 1, got {value!r}") from None
    if not 0 <= ratio < 1:
        raise ValueError(f"expected a share of all steps, from 0 up to but not including 1, got {value!r}")
    return ratio


RENAMED: dict[str, Renamed] = {
    # transformers 5 reads a warmup_steps below 1 as a share of all steps (TrainingArguments.get_warmup_steps).
    "warmup_ratio": Renamed("warmup_steps", _ratio, yields=True),
    "evaluation_strategy": Renamed("eval_strategy"),
    "no_cuda": Renamed("use_cpu"),
    "enable_liger_kernel": Renamed("use_liger_kernel"),
    "use_unsloth_gc": Renamed("activation_offload"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "push_to_hub_model_id": Renamed("hub_model_id"),
    "push_to_hub_token": Renamed("hub_token"),
    # LLaMA-Factory called these so before its version 0.9.
    "dpo_beta": Renamed("pref_beta"),
    "dpo_ftx": Renamed("pref_ftx"),
    "dpo_loss": Renamed("pref_loss"),
    "orpo_beta": Renamed("pref_beta"),
    "num_layer_trainable": Renamed("freeze_trainable_layers"),
    "name_module_trainable": Renamed("freeze_trainable_modules"),
    "lora_bf16_mode": Renamed("pure_bf16"),
    "sft_packing": Renamed("packing"),
    "cache_path": Renamed("tokenized_path"),
}


def _group(why: str, **accepts: Any) -> dict[str, Refused]:
    return {key: Refused((value,), why) for key, value in accepts.items()}


def _idle(why: str, **accepts: Any) -> dict[str, Refused]:
    return {key: Refused((value,), why, idle=True) for key, value in accepts.items()}


_MULTIMODAL = "video and audio are not read yet; a data set that brings some is refused"
_VLLM = "the vllm engine is not there yet; leave the key out, and answers come from transformers"
_SGLANG = "the sglang engine is not there yet; leave the key out, and answers come from transformers"
_KT = "ktransformers is not supported; leave the key out"
_PPO = "belongs to stage ppo, which is not there yet"
_REWARD = "a reward model is read by stage ppo only, which is not there yet"
_SWANLAB = "write report_to: swanlab; SwanLab's own environment variables (SWANLAB_PROJECT ...) set the rest"
_RAY = "Ray connects its workers by itself; for torchrun set the environment variables of the same names"
_RAY_FILES = "ray_storage_path is a folder that every node sees; leave the key out"
_PROFILER = "the profiler is not there yet; leave the key out"
_FP8 = "fp8 training is not supported yet; use bf16: true"
_MEGATRON = "Megatron is not supported; leave the key out"
_PARALLEL = "HyperParallel is not supported; leave the key out"
_EVALUATION = "benchmarks are not there yet; leave the key out"
_LOSS = "this loss is not there yet; leave the key out for plain cross-entropy"
_PREDICT = "scoring generated answers is not there yet; write them with `luthier infer CONFIG`"
_EXPORT_QUANT = "quantising on export is not supported yet; export first, then quantise with the tool of your choice"
_RATIO = "BAdam's mode ratio clips nothing, drops weight_decay and cannot be resumed; use badam_mode: layer"
_UNSLOTH = "training is plain transformers and peft here, which learns the same; Luthier packs and shares prefixes"

LLAMA_FACTORY: dict[str, Refused] = {
    # data
    **_idle(_MULTIMODAL, video_max_pixels=65536, video_min_pixels=256, video_fps=2.0, video_maxlen=128),
    **_idle(_MULTIMODAL, use_audio_in_video=False, audio_sampling_rate=16000),
    "ignore_pad_token_for_loss": Refused((True,), "padding is never trained here; leave the key out"),
    **_group(_PREDICT, eval_num_beams=None, predict_with_generate=False, generation_max_length=None),
    **_group(_PREDICT, generation_num_beams=None, generation_config=None, sortish_sampler=False),
    # model
    **_idle("transformers 5 has one tokenizer class per model", use_fast_tokenizer=True),
    **_idle("transformers 5 always loads in little memory", low_cpu_mem_usage=True),
    "shift_attn": Refused((False,), "S2-Attention is not supported: it rewrites old Llama code; leave the key out"),
    "mixture_of_depths": Refused((None,), "mixture of depths is not supported: such models load nowhere else"),
    "upcast_lmhead_output": Refused((False, True), "log-probabilities are computed in float32 whatever this key says"),
    "infer_backend": Refused(("huggingface", "hf"), "only huggingface is there yet"),
    "visual_inputs": Refused((False, True), "whether a model reads images is read from its config.json"),
    "train_mm_proj_only": Refused(
        (False,), "write freeze_language_model: true, freeze_multi_modal_projector: false and finetuning_type: full"
    ),
    "reserved_label_len": Refused((1,), "LLaMA-Factory dropped it; cutoff_len is shared by prompt and answer now"),
    **_idle("no weights are offloaded to disk", offload_folder="offload"),
    **_idle("generation always uses the cache", use_kv_cache=True),
    **_idle("the kernels of torch and transformers compute the same", use_v1_kernels=False),
    **_idle(_UNSLOTH, use_unsloth=False),
    # quantisation, other engines
    **_group(_EXPORT_QUANT, export_quantization_bit=None, export_quantization_dataset=None),
    **_group(_EXPORT_QUANT, export_quantization_nsamples=128, export_quantization_maxlen=1024),
    "export_legacy_format": Refused((False,), "models are always saved as safetensors; leave the key out"),
    "export_hub_model_id": Refused((None,), "not supported yet; upload the folder with `hf upload`"),
    **_group(_VLLM, vllm_maxlen=4096, vllm_gpu_util=0.7, vllm_enforce_eager=False, vllm_max_lora_rank=32),
    **_group(_VLLM, vllm_config=None),
    **_group(_SGLANG, sglang_maxlen=4096, sglang_mem_fraction=0.7, sglang_tp_size=-1, sglang_config=None),
    **_group(_SGLANG, sglang_lora_backend="triton"),
    **_group(_KT, use_kt=False, kt_config=None, kt_cpu_activation=None, kt_weight_path=None),
    **_group(_KT, kt_non_expert_weight_path=None, kt_expert_checkpoint_path=None, kt_use_lora_experts=None),
    **_group(_KT, kt_lora_expert_num=None, kt_lora_expert_intermediate_size=None),
    **_group(_KT, kt_optimize_rule=None, cpu_infer=32, chunk_size=8192, mode="normal", kt_maxlen=4096),
    **_group(_KT, kt_use_cuda_graph=True, kt_mode="normal", kt_force_think=False),
    # adapters
    "module_dropout": Refused((0,), "peft's OFT layers keep the number and never drop a block; leave the key out"),
    # stages to come
    **_group(_PPO, ppo_buffer_size=1, ppo_epochs=4, ppo_score_norm=False, ppo_target=6, ppo_whiten_rewards=False),
    **_group(_REWARD, reward_model_adapters=None, reward_model_quantization_bit=None),
    **_group(_REWARD, reward_model_type="lora"),
    **_group(_LOSS, use_dft_loss=False, use_asft_loss=False, asft_alpha=0.1, use_eaft_loss=False, eaft_alpha=1.0),
    # optimisers
    **_group(_RATIO, badam_mode="layer", badam_update_ratio=0.05, badam_mask_mode="adjacent"),
    # trackers, launchers, profiling
    **_group(_SWANLAB, use_swanlab=False, swanlab_project="llamafactory", swanlab_workspace=None),
    **_group(_SWANLAB, swanlab_run_name=None, swanlab_mode="cloud", swanlab_api_key=None, swanlab_logdir=None),
    **_group(_SWANLAB, swanlab_lark_webhook_url=None, swanlab_lark_secret=None),
    **_group(_RAY, master_addr=None, master_port=None),
    **_group(_RAY_FILES, ray_storage_filesystem=None),
    **_group(_PROFILER, enable_torch_profiler=False, profiler_output_dir=None, profiler_wait_steps=1),
    **_group(_PROFILER, profiler_warmup_steps=1, profiler_active_steps=1, profiler_repeat=1),
    **_group(_PROFILER, profiler_record_shapes=True, profiler_profile_memory=True, profiler_with_stack=True),
    **_group(_PROFILER, profile_modules=None),
    **_group(_FP8, fp8=False, fp8_backend="auto", fp8_enable_fsdp_float8_all_gather=False),
    **_group(_PARALLEL, use_hyper_parallel=False, hyper_parallel_args=None, hyper_parallel_cp_size=1),
    **_group(_MEGATRON, use_mca=False, use_megatron_bridge=False, tensor_model_parallel_size=1),
    **_group(_MEGATRON, pipeline_model_parallel_size=1, expert_model_parallel_size=1, context_parallel_size=1),
    **_group(_MEGATRON, virtual_pipeline_model_parallel_size=None, sequence_parallel=False),
    **_group(_MEGATRON, use_distributed_optimizer=True, use_packed_sequences=False, mixed_precision="bf16_mixed"),
    **_group(_MEGATRON, megatron_pretrained_checkpoint=None, export_hf_on_finish=False, extra_config=None),
    **_group(_MEGATRON, recompute_granularity=None, recompute_method=None, recompute_num_layers=None),
    **_group(_MEGATRON, account_for_embedding_in_pipeline_split=None, account_for_loss_in_pipeline_split=None),
    **_group(_MEGATRON, bias_activation_fusion=None, apply_rope_fusion=None, masked_softmax_fusion=None),
    **_group(_MEGATRON, cross_entropy_loss_fusion=None, moe_grouped_gemm=None, moe_token_dispatcher_type=None),
    **_group(_MEGATRON, calculate_per_token_loss=None, overlap_param_gather=True, overlap_grad_reduce=True),
    **_group(_EVALUATION, task=None, task_dir="evaluation", batch_size=4, lang="en", n_shot=5, save_dir=None),
    **_group(_EVALUATION, download_mode=None),
}

STAGES = {"ppo": "ppo is not there yet; rm trains its reward model, and dpo, kto or pro learn from preferences"}
"""Stages of LLaMA-Factory that are known and not there, unless a plugin brings one."""

_HARDWARE = "devices are found without it; leave the key out"
_GONE = "transformers 5 has no such key any more; leave it out"

HUGGING_FACE: dict[str, Refused] = {
    "save_safetensors": Refused((True,), "weights are always saved as safetensors; leave the key out"),
    **_idle("the planner puts rows of like length together by itself", group_by_length=False),
    "include_tokens_per_second": Refused((False, True), "tokens per second are always reported"),
    "use_mps_device": Refused((False, True), "a Mac's GPU is found without it; use_cpu: true keeps a run off it"),
    "fp16_backend": Refused(("auto",), _GONE),
    "half_precision_backend": Refused(("auto",), _GONE),
    "fp16_opt_level": Refused(("O1",), _GONE),
    "push_to_hub_organization": Refused((None,), "write hub_model_id: ORGANISATION/NAME"),
    "adafactor": Refused((False,), "write optim: adafactor"),
    "split_batches": Refused((None, False), "every process reads its own rows; leave the key out"),
    "dispatch_batches": Refused((None, False), "every process reads its own rows; leave the key out"),
    "include_inputs_for_metrics": Refused((False,), "metrics come from the objective; leave the key out"),
    "fsdp_min_num_params": Refused((0,), "write it in fsdp_config: {min_num_params: N}"),
    "fsdp_transformer_layer_cls_to_wrap": Refused((None,), "write it in fsdp_config"),
    **_group(_GONE, jit_mode_eval=False, past_index=-1, torchdynamo=None, ray_scope="last", sharded_ddp=""),
    **_group(_GONE, mp_parameters="", xpu_backend=None),
    **_group(_HARDWARE, use_ipex=False, tpu_num_cores=None, tpu_metrics_debug=False),
}

REFUSED: dict[str, Refused] = LLAMA_FACTORY | HUGGING_FACE
"""All of them, as the gate reads them."""

PEERS: dict[str, str] = {
    # Axolotl
    "base_model": "model_name_or_path",
    "datasets": "dataset",
    "sequence_len": "cutoff_len",
    "sample_packing": "packing",
    "chat_template": "template",
    "val_set_size": "val_size",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "adapter": "finetuning_type",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "lora_target_linear": "lora_target: all",
    "lora_modules_to_save": "additional_target",
    "lora_model_dir": "adapter_name_or_path",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "load_in_4bit": "quantization_bit: 4",
    "load_in_8bit": "quantization_bit: 8",
    "flash_attention": "flash_attn: fa2",
    "train_on_inputs": "train_on_prompt",
    "wandb_project": "report_to: wandb, with WANDB_PROJECT in the environment",
    "rl": "stage",
    # TRL
    "dataset_name": "dataset",
    "max_seq_length": "cutoff_len",
    "attn_implementation": "flash_attn",
    "use_peft": "finetuning_type: lora",
    "loss_type": "pref_loss",
    "beta": "pref_beta",
    "rpo_alpha": "pref_ftx",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
    "precompute_ref_log_probs": "precompute_reference",
}
"""What Axolotl and TRL call keys of ours, for a hint; what such a key holds may be written another way."""


@dataclass(frozen=True)
class Variable:
    """An environment variable that LLaMA-Factory reads."""

    does: str
    """What comes of it here."""
    works: bool = False
    """It does here what it does there. False: whoever sets it for training is told that it changes nothing."""
    verb: str = "train"
    """Which command it is for."""


def _all(does: str, *names: str, **facts: Any) -> dict[str, Variable]:
    return dict.fromkeys(names, Variable(does, **facts))


ENVIRONMENT: dict[str, Variable] = {
    "FORCE_TORCHRUN": Variable("1 starts training under torchrun, with one process too", works=True),
    "NNODES": Variable("number of machines", works=True),
    "NODE_RANK": Variable("which of the machines this is, from 0", works=True),
    "NPROC_PER_NODE": Variable("processes on this machine; unset: one for each accelerator", works=True),
    **_all("where the first machine listens", "MASTER_ADDR", "MASTER_PORT", works=True),
    "RDZV_ID": Variable("name of an elastic job, whose machines may come and go", works=True),
    **_all("fewest and most machines of an elastic job", "MIN_NNODES", "MAX_NNODES", works=True),
    "MAX_RESTARTS": Variable("how often torchrun starts an elastic job again, or Ray any (unset: 3)", works=True),
    "USE_RAY": Variable("1 starts training on a Ray cluster, as --ray does", works=True),
    "WANDB_PROJECT": Variable("the project of report_to: wandb", works=True),
    "ALLOW_EXTRA_ARGS": Variable("1 makes unknown keys a warning", works=True),
    "LLAMAFACTORY_VERBOSITY": Variable("least severe message that is shown: DEBUG, INFO, WARN, ERROR", works=True),
    "OPTIM_TORCH": Variable("set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True yourself where memory is tight"),
    "DISABLE_VERSION_CHECK": Variable("versions are checked when packages are installed and never later"),
    "FORCE_CHECK_IMPORTS": Variable("transformers' check of imports is never switched off"),
    "USE_MODELSCOPE_HUB": Variable("1 makes hub ids those of ModelScope: `pip install modelscope`", works=True),
    "USE_OPENMIND_HUB": Variable("1 makes hub ids those of Modelers: `pip install openmind-hub`", works=True),
    **_all("Megatron is not supported; the run trains without it", "USE_MCA", "USE_MEGATRON_BRIDGE"),
    "USE_KT": Variable("KTransformers is not supported"),
    "USE_V1": Variable("there is one set of keys, LLaMA-Factory's v0"),
    "RECORD_VRAM": Variable("use report_to with a tracker that records memory"),
    "NPU_JIT_COMPILE": Variable("torch_npu's own settings hold"),
    **_all("markers in texts are <image>, <video> and <audio>", "IMAGE_PLACEHOLDER", "VIDEO_PLACEHOLDER",
           "AUDIO_PLACEHOLDER"),
    "DOWNSAMPLE_MODE": Variable("the model's own image processor decides"),
    **_all("not there yet", "API_HOST", "API_PORT", "API_KEY", "API_MODEL_NAME", "API_VERBOSE", "FASTAPI_ROOT_PATH",
           "MAX_CONCURRENT", "ALLOW_LOCAL_FILES", "SAFE_MEDIA_PATH", verb="api"),
    **_all("not there yet", "GRADIO_SHARE", "GRADIO_IPV6", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "DEMO_MODEL",
           "DEMO_TEMPLATE", "DEMO_BACKEND", "LLAMABOARD_ENABLED", "LLAMABOARD_WORKDIR", verb="webui"),
}  # fmt: skip
"""Environment variables that users of LLaMA-Factory set, for docs/compatibility.md and for a warning."""


def idle_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """A warning for each variable that somebody set for training and that changes nothing."""
    for name, variable in ENVIRONMENT.items():
        value = environ.get(name, "")
        if value and not variable.works and variable.verb == "train" and (is_true(value) or name in VALUES):
            yield f"The environment sets {name}={value}, which has no effect: {variable.does}."


VALUES = ("IMAGE_PLACEHOLDER", "VIDEO_PLACEHOLDER", "AUDIO_PLACEHOLDER", "DOWNSAMPLE_MODE")
"""Variables that are no switches."""

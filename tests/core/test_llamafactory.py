"""Every argument and variable of LLaMA-Factory is known: written down by hand, held against the code."""

from __future__ import annotations

import pytest

from luthier import schema
from luthier.core.compat import ENVIRONMENT, PEERS, REFUSED, RENAMED, idle_variables
from luthier.core.errors import ConfigError
from luthier.core.log import set_up
from luthier.run import resolve

BASE = {"model_name_or_path": "some/model", "dataset": "mine", "output_dir": "out"}

ARGUMENTS = {
    "data": """
        template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history streaming
        buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size preprocessing_num_workers
        max_samples eval_num_beams ignore_pad_token_for_loss val_size eval_on_each_dataset packing neat_packing
        tool_format default_system enable_thinking preserve_thinking tokenized_path data_shared_file_system""",
    "model": """
        model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
        split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens model_revision
        low_cpu_mem_usage rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth use_unsloth_gc
        enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing use_reentrant_gc upcast_layernorm
        upcast_lmhead_output train_from_scratch infer_backend offload_folder use_kv_cache use_v1_kernels infer_dtype
        hf_hub_token ms_hub_token om_hub_token print_param_status trust_remote_code""",
    "quantisation": """
        quantization_method quantization_bit quantization_type double_quantization quantization_device_map""",
    "processor": """
        image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels
        video_fps video_maxlen use_audio_in_video audio_sampling_rate""",
    "export": """
        export_dir export_size export_device export_quantization_bit export_quantization_dataset
        export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id""",
    "vllm": "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config",
    "sglang": "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
    "ktransformers": """
        use_kt kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts
        kt_lora_expert_num kt_lora_expert_intermediate_size kt_config""",
    "freeze": "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
    "lora": """
        additional_target lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding
        use_rslora use_dora pissa_init pissa_iter pissa_convert create_new_adapter""",
    "oft": "module_dropout oft_rank oft_block_size oft_target",
    "rlhf": """
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
        simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model
        ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
        reward_model_quantization_bit reward_model_type ld_alpha""",
    "galore": """
        use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise""",
    "apollo": """
        use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
        apollo_scale_type apollo_layerwise apollo_scale_front""",
    "badam": """
        use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode badam_verbose""",
    "swanlab": """
        use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir
        swanlab_lark_webhook_url swanlab_lark_secret""",
    "finetuning": """
        pure_bf16 stage finetuning_type use_llama_pro use_adam_mini use_mca use_megatron_bridge use_hyper_parallel
        hyper_parallel_args hyper_parallel_cp_size use_muon use_dft_loss use_asft_loss asft_alpha use_eaft_loss
        eaft_alpha freeze_vision_tower freeze_multi_modal_projector freeze_language_model compute_accuracy
        disable_shuffling early_stopping_steps plot_loss include_effective_tokens_per_second""",
    "its own training arguments": """
        overwrite_output_dir ray_num_workers ray_init_kwargs master_addr master_port enable_torch_profiler
        profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat
        profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules fp8 fp8_backend
        fp8_enable_fsdp_float8_all_gather""",
    "generating": """
        do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty
        skip_special_tokens""",
    "evaluation": "task task_dir batch_size seed lang n_shot save_dir download_mode",
    "megatron bridge": """
        tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size context_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel recompute_granularity recompute_method
        recompute_num_layers account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        bias_activation_fusion apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion moe_grouped_gemm
        moe_token_dispatcher_type calculate_per_token_loss use_distributed_optimizer overlap_param_gather
        overlap_grad_reduce use_packed_sequences mixed_precision megatron_pretrained_checkpoint export_hf_on_finish
        extra_config""",
    # Seq2SeqTrainingArguments of transformers 4.55 to 5.8, which it runs with.
    "hugging face": """
        output_dir do_train do_eval do_predict eval_strategy prediction_loss_only per_device_train_batch_size
        per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size gradient_accumulation_steps
        eval_accumulation_steps eval_delay torch_empty_cache_steps learning_rate weight_decay adam_beta1 adam_beta2
        adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio
        warmup_steps log_level log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step
        logging_steps logging_nan_inf_filter save_strategy save_steps save_total_limit save_safetensors
        save_on_each_node save_only_model restore_callback_states_from_checkpoint no_cuda use_cpu use_mps_device seed
        data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level half_precision_backend bf16_full_eval fp16_full_eval
        tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps
        dataloader_num_workers dataloader_prefetch_factor past_index run_name disable_tqdm remove_unused_columns
        label_names load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip fsdp
        fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap accelerator_config parallelism_config
        deepspeed label_smoothing_factor optim optim_args adafactor group_by_length length_column_name report_to
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_pin_memory
        dataloader_persistent_workers skip_memory_metrics push_to_hub resume_from_checkpoint hub_model_id hub_strategy
        hub_token hub_private_repo hub_always_push hub_revision gradient_checkpointing gradient_checkpointing_kwargs
        include_inputs_for_metrics include_for_metrics eval_do_concat_batches fp16_backend push_to_hub_model_id
        push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size full_determinism torchdynamo
        ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode include_tokens_per_second
        include_num_input_tokens_seen neftune_noise_alpha optim_target_modules batch_eval_metrics eval_on_start
        use_liger_kernel liger_kernel_config eval_use_gather_object average_tokens_across_devices project
        trackio_space_id evaluation_strategy sortish_sampler predict_with_generate generation_max_length
        generation_num_beams generation_config""",
    # Names that older versions had and that old files still bring.
    "older": """
        dpo_beta dpo_ftx dpo_loss orpo_beta num_layer_trainable name_module_trainable lora_bf16_mode sft_packing
        cache_path visual_inputs train_mm_proj_only reserved_label_len ray_run_name ray_storage_path
        ray_storage_filesystem resources_per_worker placement_strategy kt_optimize_rule cpu_infer chunk_size mode
        kt_maxlen kt_use_cuda_graph kt_mode kt_force_think""",
}  # fmt: skip
NAMES = sorted({name for block in ARGUMENTS.values() for name in block.split()})

VARIABLES = """
    FORCE_TORCHRUN NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT RDZV_ID MIN_NNODES MAX_NNODES MAX_RESTARTS
    OPTIM_TORCH USE_RAY USE_KT USE_MCA USE_MEGATRON_BRIDGE USE_V1 DISABLE_VERSION_CHECK ALLOW_EXTRA_ARGS
    FORCE_CHECK_IMPORTS LLAMAFACTORY_VERBOSITY USE_MODELSCOPE_HUB USE_OPENMIND_HUB RECORD_VRAM WANDB_PROJECT
    IMAGE_PLACEHOLDER VIDEO_PLACEHOLDER AUDIO_PLACEHOLDER NPU_JIT_COMPILE GRADIO_SHARE GRADIO_IPV6 GRADIO_SERVER_NAME
    GRADIO_SERVER_PORT DEMO_MODEL DEMO_TEMPLATE DEMO_BACKEND LLAMABOARD_ENABLED LLAMABOARD_WORKDIR DOWNSAMPLE_MODE
    API_HOST API_PORT API_KEY API_MODEL_NAME API_VERBOSE FASTAPI_ROOT_PATH MAX_CONCURRENT ALLOW_LOCAL_FILES
    SAFE_MEDIA_PATH
""".split()


def test_every_argument_works_or_is_refused_with_a_reason():
    owned = {key for section in schema.sections() for key in section.keys}
    assert [name for name in NAMES if name not in owned | RENAMED.keys() | REFUSED.keys()] == []
    assert [name for name, rule in REFUSED.items() if len(rule.why) < 12] == []
    assert [name for name, rule in RENAMED.items() if rule.new not in owned] == []


def test_every_argument_is_in_the_pages():
    """What works stands in keys.md, what does not or has another name in compatibility.md."""
    pages = schema.keys_page() + schema.compatibility_page()
    assert [name for name in (*NAMES, *VARIABLES) if f"`{name}`" not in pages] == []


def test_there_is_no_argument_without_an_answer_at_the_gate():
    """None of them is ever "no such key"; null asks for nothing or is of the wrong type."""
    for name in NAMES:
        try:
            resolve({**BASE, name: BASE.get(name)})
        except ConfigError as error:
            assert f"{name}: no such key" not in str(error), name


@pytest.mark.parametrize(
    "old, value, message",
    [("dpo_beta", 0.3, "dpo_beta belongs to stage dpo"), ("name_module_trainable", "mlp", "finetuning_type freeze")],
)
def test_an_old_name_of_another_part_is_still_known(old, value, message):
    (warning,) = resolve(BASE | {old: value, "finetuning_type": "full"}).warnings
    assert message in warning


def test_old_names_reach_their_keys():
    run = resolve(BASE | {"stage": "dpo", "dpo_beta": 0.3, "dpo_loss": "ipo", "sft_packing": True})
    assert (run.objective.config.pref_beta, run.objective.config.pref_loss) == (0.3, "ipo") and run.layout.packing
    freeze = {"finetuning_type": "freeze", "num_layer_trainable": 3, "name_module_trainable": "mlp"}
    assert resolve(BASE | freeze).adapter_keys.freeze_trainable_layers == 3


@pytest.mark.parametrize("key, value", [("video_max_pixels", 16384), ("use_unsloth", True), ("use_v1_kernels", "yes")])
def test_what_changes_nothing_but_speed_is_a_warning(tmp_path, key, value):
    (tmp_path / "run.yaml").write_text("".join(f"{k}: {v}\n" for k, v in (BASE | {key: value}).items()))
    (warning,) = resolve(str(tmp_path / "run.yaml")).warnings
    assert warning.startswith(f"{tmp_path}/run.yaml:{len(BASE) + 1}: {key} has no effect: ")
    assert resolve(BASE | {key: REFUSED[key].accepts[0]}).warnings == ()


def test_a_stage_that_is_not_there_yet_is_no_slip_of_the_pen():
    with pytest.raises(ConfigError) as caught:
        resolve(BASE | {"stage": "ppo", "reward_model": "rm"})
    assert "ppo is not there yet" in str(caught.value) and "Did you mean" not in str(caught.value)


# The environment


def test_every_variable_is_named():
    assert sorted(VARIABLES) == sorted(ENVIRONMENT)
    assert all(variable.does for variable in ENVIRONMENT.values())


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"USE_V1": "1"}, ["USE_V1=1"]),
        ({"USE_MCA": "true", "RECORD_VRAM": "1"}, ["USE_MCA=true", "RECORD_VRAM=1"]),
        ({"USE_V1": "0", "USE_KT": "false", "RECORD_VRAM": ""}, []),
        ({"IMAGE_PLACEHOLDER": "<img>"}, ["IMAGE_PLACEHOLDER=<img>"]),
        ({"FORCE_TORCHRUN": "1", "API_PORT": "8000", "SOMETHING": "1"}, []),
    ],
)
def test_a_set_variable_that_changes_nothing_is_said(environ, words):
    said = list(idle_variables(environ))
    assert len(said) == len(words) and all(word in text for word, text in zip(words, said))
    assert all("no effect" in text for text in said)


def test_a_run_says_it_and_inference_does_not(monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    assert any("USE_V1=1" in warning for warning in resolve(BASE).warnings)
    assert not any("USE_V1" in warning for warning in resolve(BASE, verb="chat").warnings)


def test_a_key_near_an_old_name_is_told_the_new_one():
    # sft_packing is the nearest there is, and an old name of packing.
    with pytest.raises(ConfigError, match="sft_packin: no such key; did you mean 'packing'"):
        resolve(BASE | {"sft_packin": True})


def test_allow_extra_args(monkeypatch):
    with pytest.raises(ConfigError, match="no such key; did you mean 'lora_rank'"):
        resolve(BASE | {"lora_rnk": 3})
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    (warning,) = resolve(BASE | {"lora_rnk": 3}).warnings
    assert "lora_rnk has no effect" in warning and "lora_rank" in warning
    with pytest.raises(ConfigError, match="lora_rank: expected a whole number"):
        resolve(BASE | {"lora_rank": "x"})


def test_verbosity(monkeypatch):
    import logging

    root = logging.getLogger("luthier")
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "propagate", root.propagate)
    monkeypatch.delenv("RANK", raising=False)
    for said, level in (("WARN", logging.WARNING), ("debug", logging.DEBUG), ("", logging.INFO), ("?", logging.INFO)):
        monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", said)
        set_up()
        assert root.level == level


def test_keys_of_axolotl_and_trl_are_told_what_they_are_called_here(tmp_path):
    owned = {key for section in schema.sections() for key in section.keys}
    assert {meant.partition(":")[0] for meant in PEERS.values()} <= owned
    assert not PEERS.keys() & (owned | RENAMED.keys() | REFUSED.keys())
    with pytest.raises(ConfigError) as caught:
        resolve({"base_model": "x", "load_in_4bit": True, "output_dir": str(tmp_path)})
    assert "base_model: no such key; here it is model_name_or_path" in str(caught.value)
    assert "load_in_4bit: no such key; here it is quantization_bit: 4" in str(caught.value)

"""Flags of musubi-tuner's scripts that are not supported: why, and what to use instead."""

_ATTENTION = "the only attention is PyTorch's, which picks the device's fastest kernel: use --sdpa"
_LORA = "this script trains a slice of the checkpoint itself, not a LoRA: use --ff 0.001 --ffid 1"
_COMPILE = "--compile compiles the pointwise functions of the blocks, in one way; leave it out"
_HUB = "nothing is uploaded; upload the files in --output_dir yourself"
_DDP = "the slice's gradients are averaged without DDP; leave it out"

_TRAINING_TOGETHER = {
    _ATTENTION: ("--flash_attn", "--sage_attn", "--xformers", "--flash3", "--split_attn"),
    _LORA: (
        *("--network_module", "--network_dim", "--network_alpha", "--network_dropout", "--network_args"),
        *("--network_weights", "--dim_from_weights", "--scale_weight_norms"),
        *("--base_weights", "--base_weights_multiplier"),
    ),
    _COMPILE: (
        *("--compile_backend", "--compile_mode", "--compile_dynamic", "--compile_fullgraph"),
        *("--compile_cache_size_limit", "--dynamo_backend", "--dynamo_mode", "--dynamo_fullgraph", "--dynamo_dynamic"),
    ),
    _HUB: (
        *("--huggingface_repo_id", "--huggingface_repo_type", "--huggingface_path_in_repo", "--huggingface_token"),
        *("--huggingface_repo_visibility", "--save_state_to_huggingface", "--resume_from_huggingface"),
        "--async_upload",
    ),
    _DDP: ("--ddp_gradient_as_bucket_view", "--ddp_static_graph"),
}
TRAINING = {
    **{flag: reason for reason, flags in _TRAINING_TOGETHER.items() for flag in flags},
    "--i2v": "it is for wan_cache_latents.py; here --task says which kind of model is trained; leave it out",
    "--one_frame": "models are trained on whole clips, and on pictures where they make videos from text; leave it out",
    "--img_in_txt_in_offloading": "it is for HunyuanVideo; use --blocks_to_swap",
    "--guidance_scale": "it is for HunyuanVideo; a sample's guidance scale is --l in its line of --sample_prompts",
    "--disable_numpy_memmap": "checkpoints are always memory-mapped; leave it out",
    "--vae_cache_cpu": "the VAE is on the GPU only while samples are decoded; leave it out",
    "--wandb_api_key": "every user of this machine could read a key on the command line; run `wandb login` first",
}


_WHOLE_LORA = "a LoRA of --lora_weight is used as a whole; leave it out"
_NO_LYCORIS = "only ordinary LoRAs (up and down matrices) can be loaded, with --lora_weight"
_NO_MERGING = "LoRAs are computed beside the model and not merged into it; leave it out"
_NO_FP8 = "the computation is in 16 or 32 bits; weights are kept in fp8 with --fp8 --fp8_scaled"
_NO_CONTROL = "models with control videos are not supported, nor is video-to-video; leave it out"
_NO_ONE_FRAME = (
    "one-frame inference is not supported; a picture as the first frame is --image_path, as the last --end_image_path"
)
_ONE_GUIDANCE = "guidance is the same in every step and layer; set its strength with --guidance_scale"

_GENERATION_TOGETHER = {
    _WHOLE_LORA: ("--include_patterns", "--exclude_patterns"),
    _NO_LYCORIS: ("--lycoris",),
    _NO_MERGING: ("--save_merged_model",),
    _NO_FP8: ("--fp8_fast",),
    _NO_CONTROL: ("--video_path", "--control_path"),
    _NO_ONE_FRAME: ("--one_frame_inference", "--control_image_path", "--control_image_mask_path"),
    _ONE_GUIDANCE: (
        *("--cfg_skip_mode", "--cfg_apply_ratio", "--slg_layers", "--slg_scale", "--slg_start", "--slg_end"),
        "--slg_mode",
    ),
    _COMPILE: (
        *("--compile_backend", "--compile_mode", "--compile_dynamic", "--compile_fullgraph"),
        *("--compile_cache_size_limit", "--compile_args"),
    ),
}
GENERATION = {
    **{flag: reason for reason, flags in _GENERATION_TOGETHER.items() for flag in flags},
    "--ckpt_dir": "give the files one by one: --dit, --dit_high_noise, --vae and --t5",
    "--vae_cache_cpu": "leave it out; a smaller --video_size or --video_length takes less memory to decode",
    "--disable_numpy_memmap": "checkpoints are always memory-mapped; leave it out",
    "--trim_tail_frames": "an end picture is the last frame and adds none; --video_length sets the number of frames",
}

_NO_PREVIEW = "cached latents are not displayed; open the pictures themselves"
_HUNYUAN_VAE = "it is for HunyuanVideo's VAE; to save memory use a smaller --batch_size, or --device cpu"

CACHING_LATENTS = {
    **dict.fromkeys(("--debug_mode", "--console_width", "--console_back", "--console_num_images"), _NO_PREVIEW),
    **dict.fromkeys(("--vae_chunk_size", "--vae_spatial_tile_sample_min_size"), _HUNYUAN_VAE),
    "--one_frame": "pictures made from other pictures cannot be trained; leave it out",
    "--vae_cache_cpu": "the VAE keeps its frame cache on the GPU; use a smaller --batch_size, or --device cpu",
    "--vae_tiling": "tiled latents differ from whole ones; use a smaller --batch_size, or --device cpu",
}

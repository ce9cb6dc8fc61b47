#!/usr/bin/env bash
# GRPO or PPO with a rubric's reward on OpenRLHF 0.11, by promedical policy export-openrlhf.
# More than one node: "ray start --head" on the first, "ray start --address=FIRST:6379" on the
# others, then this script on the first; this folder is on a file system that all of them see.
# A reward server's token: $PROMEDICAL_TOKEN where "ray start" runs, or token_file in reward.yaml.
# Stopped or killed, the same command goes on from the last checkpoint.
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python3 "$HERE"/train.py \
  --actor.model_name_or_path Qwen/Qwen3-8B \
  --reward.remote_url "$HERE"/promedical_reward.py \
  --reward.clip_range -3.0 1.2 \
  --data.prompt_dataset "$HERE"/train.jsonl \
  --data.input_key prompt \
  --data.label_key label \
  --data.apply_chat_template \
  --data.max_len 4096 \
  --rollout.max_new_tokens 2048 \
  --rollout.batch_size 128 \
  --rollout.n_samples_per_prompt 8 \
  --rollout.temperature 1.0 \
  --rollout.top_p 1.0 \
  --train.batch_size 1024 \
  --train.max_epochs 1 \
  --train.num_episodes 1 \
  --train.dynamic_batch_enable \
  --train.max_tokens_per_gpu 16384 \
  --train.seed 0 \
  --train.colocate_all \
  --actor.adam.lr 1e-06 \
  --actor.lr_scheduler constant \
  --actor.lr_warmup_ratio 0 \
  --actor.eps_clip 0.2 \
  --actor.gradient_checkpointing_enable \
  --actor.num_nodes 2 \
  --actor.num_gpus_per_node 8 \
  --ref.num_nodes 2 \
  --ref.num_gpus_per_node 8 \
  --vllm.num_engines 16 \
  --vllm.tensor_parallel_size 1 \
  --vllm.gpu_memory_utilization 0.5 \
  --vllm.enable_sleep \
  --ds.enable_sleep \
  --ds.zero_stage 3 \
  --algo.advantage.estimator gae \
  --algo.advantage.gamma 1.0 \
  --algo.advantage.lambd 1.0 \
  --algo.kl.estimator k1 \
  --algo.kl.init_coef 0.04 \
  --actor.loss_agg_mode token-mean \
  --critic.model_name_or_path Qwen/Qwen3-8B \
  --critic.adam.lr 1e-05 \
  --critic.lr_scheduler constant \
  --critic.lr_warmup_ratio 0 \
  --critic.num_nodes 2 \
  --critic.num_gpus_per_node 8 \
  --ckpt.path "$HERE"/checkpoints \
  --ckpt.output_dir "$HERE"/policy \
  --ckpt.save_steps 20 \
  --ckpt.save_hf \
  --ckpt.load_enable \
  --ckpt.best_metric_key none \
  --actor.max_norm 0.5 \
  "$@"

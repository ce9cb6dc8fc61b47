#!/usr/bin/env bash
# GRPO or PPO with a rubric's reward on verl 0.9, written by promedical policy export-verl.
# More than one node: "ray start --head" on the first, "ray start --address=FIRST:6379" on the
# others, then this script on the first; this folder is on a file system that all of them see.
# A reward server's token: $PROMEDICAL_TOKEN where "ray start" runs, or token_file in reward.yaml.
# Stopped or killed, the same command goes on from the last checkpoint.
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python3 -m verl.trainer.main_ppo \
  data.train_files="$HERE"/train.parquet \
  data.val_files="$HERE"/train.parquet \
  data.train_batch_size=128 \
  data.max_prompt_length=2048 \
  data.max_response_length=2048 \
  data.filter_overlong_prompts=True \
  data.truncation=error \
  data.shuffle=True \
  data.seed=0 \
  +data.apply_chat_template_kwargs.enable_thinking=False \
  actor_rollout_ref.model.path=Qwen/Qwen3-8B \
  actor_rollout_ref.actor.optim.lr=1e-06 \
  actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  actor_rollout_ref.actor.ppo_epochs=1 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.actor.clip_ratio=0.2 \
  actor_rollout_ref.actor.entropy_coeff=0 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.top_p=1.0 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  algorithm.adv_estimator=grpo \
  algorithm.norm_adv_by_std_in_grpo=True \
  algorithm.use_kl_in_reward=False \
  actor_rollout_ref.actor.use_kl_loss=True \
  actor_rollout_ref.actor.kl_loss_coef=0.04 \
  actor_rollout_ref.actor.kl_loss_type=low_var_kl \
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
  reward.custom_reward_function.path="$HERE"/promedical_reward.py \
  reward.custom_reward_function.name=compute_score \
  +reward.custom_reward_function.reward_kwargs.specification="$HERE"/reward.yaml \
  reward.num_workers=8 \
  trainer.use_v1=True \
  trainer.v1.trainer_mode=sync \
  trainer.v1.sampler.custom_sampler.path="$HERE"/promedical_reward.py \
  trainer.v1.sampler.custom_sampler.name=StopOnFailure \
  trainer.nnodes=2 \
  trainer.n_gpus_per_node=8 \
  trainer.total_epochs=1 \
  trainer.total_training_steps=null \
  trainer.save_freq=20 \
  trainer.test_freq=-1 \
  trainer.val_before_train=False \
  trainer.resume_mode=auto \
  trainer.default_local_dir="$HERE"/checkpoints \
  trainer.project_name=clinic \
  trainer.experiment_name=grpo \
  'trainer.logger=[console,file]' \
  trainer.log_val_generations=0 \
  trainer.rollout_data_dir=null \
  trainer.validation_data_dir=null \
  "$@"

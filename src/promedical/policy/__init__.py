"""Policy optimisation (section 5): a frozen, criterion-wise reward model as GRPO's oracle.

`rewards` turns verdicts into TRL's reward function, `grpo` trains, `generate` answers questions
with a policy. Nothing is imported here, so that reading a reward's definition costs no torch.
"""

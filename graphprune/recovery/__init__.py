"""Knowledge recovery: LoRA fine-tuning of a pruned model on a mixture of sources (LoRAShear, Alg. 5)."""

"""A language model pruned in one shot and recovered by distillation, judged by perplexity on held-out documents."""

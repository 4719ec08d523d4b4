"""Fine-tuning on real tasks, sparse beside dense at equal budget: data, training, runs and what they say."""

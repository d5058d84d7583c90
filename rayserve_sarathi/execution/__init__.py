"""A stage at work: step messages to tensors, the KV cache, the model, the sampler."""

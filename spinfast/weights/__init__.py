"""What is computed of a model's weight matrices without the model: they are read one by one from safetensors."""

"""Convert: a checkpoint (Hugging Face safetensors, GGUF) in, an artifact out, in bounded memory."""

"""Text decoders of our own: input buffers in, hidden states and logits out."""

"""Text decoders: they compute hidden states and logits from the input buffers."""

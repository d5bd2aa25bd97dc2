"""Prefill on one worker, decode on another: prompts go one way, first tokens and KV the other."""

"""Prefill on one worker, decode on another: prompts go to the first, their first tokens and KV to the second."""

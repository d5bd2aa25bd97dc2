"""The gateway: an OpenAI front before vLLM servers, which get the sizes of media in their place, or before workers."""

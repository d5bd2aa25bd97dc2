"""The gateway: an OpenAI front before vLLM servers, which get the sizes of media instead of the media themselves."""

// Sends a chat request and reads its answer as server-sent events.

// Yields the chunks of a streamed answer. An error says why there is none, or why it breaks off.
export async function* chatChunks(body, signal) {
  const response = await reached(
    fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    }),
    `The worker at ${location.host} does not answer.`,
  );
  if (!response.ok) throw new Error(await reason(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = "The connection to the worker broke before the answer was complete.";
  let pending = "";
  for (;;) {
    const { done, value } = await reached(reader.read(), broken);
    if (done) throw new Error(broken);
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// What a failed promise of the network means; a request that was stopped stays an AbortError.
async function reached(promise, message) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(message, { cause: error });
  }
}

// Of an answer with an error status: a proxy's is not JSON.
async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The answer has status ${response.status} ${response.statusText}`.trim();
  }
}

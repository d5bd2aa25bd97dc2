// What Vercel's AI SDK is asked, the same for each of its providers.

import { generateText, streamText } from 'ai';

function messages(question, pictures = []) {
  const content = pictures.map((image) => ({ type: 'image', image }));
  return [{ role: 'user', content: [...content, { type: 'text', text: question }] }];
}

const usageOf = (usage) => ({ prompt_tokens: usage.inputTokens, completion_tokens: usage.outputTokens });

export async function ask(model, { question, pictures, temperature = 0, max_tokens = 64 }) {
  const answer = await generateText({
    model, messages: messages(question, pictures), temperature, maxOutputTokens: max_tokens, maxRetries: 0,
  });
  return { text: answer.text, finish_reason: answer.finishReason, ...usageOf(answer.usage) };
}

export async function stream(model, { question, pictures }) {
  const errors = [];
  const answer = streamText({
    model, messages: messages(question, pictures), temperature: 0, maxOutputTokens: 64, maxRetries: 0,
    onError: ({ error }) => errors.push(error),
  });
  const pieces = [];
  for await (const piece of answer.textStream) pieces.push(piece);
  if (errors.length) throw errors[0];
  return { pieces, finish_reason: await answer.finishReason, ...usageOf(await answer.usage) };
}

export async function logprobs(model, { question }) {
  const answer = await generateText({
    model, messages: messages(question), temperature: 0, maxOutputTokens: 8, maxRetries: 0,
    providerOptions: { openai: { logprobs: 2 } },
  });
  return answer.providerMetadata.openai.logprobs.map(
    (each) => [each.token, each.logprob, each.top_logprobs.map((top) => top.logprob)],
  );
}

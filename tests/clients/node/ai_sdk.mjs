// What Vercel's AI SDK is asked, the same for each of its providers.

import { generateText, Output, streamText, tool } from 'ai';

import { Shape } from './shape.mjs';

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

export async function parse(model, { question, pictures }) {
  const answer = await generateText({
    model, messages: messages(question, pictures), temperature: 0, maxOutputTokens: 512, maxRetries: 0,
    output: Output.object({ schema: Shape }),
  });
  return answer.output;
}

export async function parse_stream(model, { question, pictures }) {
  const answer = streamText({
    model, messages: messages(question, pictures), temperature: 0, maxOutputTokens: 512, maxRetries: 0,
    output: Output.object({ schema: Shape }),
  });
  for await (const partial of answer.partialOutputStream) partial;
  return answer.output;
}

const choices = { named: { type: 'tool', toolName: 'report' }, required: 'required', auto: 'auto', none: 'none' };
const tools = { report: tool({ description: 'Reports a shape.', inputSchema: Shape }) };

const named = (toolCalls) => toolCalls.map((each) => ({ name: each.toolName, arguments: each.input }));

export async function call_tool(model, { question, choice }) {
  const answer = await generateText({
    model, messages: messages(question), temperature: 0, maxOutputTokens: 512, maxRetries: 0,
    tools, toolChoice: choices[choice],
  });
  return { calls: named(answer.toolCalls), text: answer.text || null, finish_reason: answer.finishReason };
}

export async function call_tool_stream(model, { question, choice }) {
  const errors = [];
  const answer = streamText({
    model, messages: messages(question), temperature: 0, maxOutputTokens: 512, maxRetries: 0,
    tools, toolChoice: choices[choice], onError: ({ error }) => errors.push(error),
  });
  await answer.consumeStream();
  if (errors.length) throw errors[0];
  return { calls: named(await answer.toolCalls), text: (await answer.text) || null, finish_reason: await answer.finishReason };
}

export async function answer_behind_tool(model, { question }) {
  const asked = { model, temperature: 0, maxOutputTokens: 512, maxRetries: 0 };
  const history = messages(question);
  const executed = { report: tool({ description: 'Reports a shape.', inputSchema: Shape, execute: () => 'done' }) };
  const first = await generateText({ ...asked, messages: history, tools: executed, toolChoice: 'required' });
  const answer = await generateText({
    ...asked, messages: [...history, ...first.response.messages], tools: executed, toolChoice: 'none',
  });
  return { calls: named(first.toolCalls), text: answer.text, ids: first.toolCalls.map((each) => each.toolCallId) };
}

// OpenAI's own client for Node.

import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';

import { Shape } from './shape.mjs';

const connect = (baseURL) => new OpenAI({ baseURL, apiKey: 'unused', maxRetries: 0 });

function messages(question, pictures = []) {
  const content = pictures.map((url) => ({ type: 'image_url', image_url: { url } }));
  return [{ role: 'user', content: [...content, { type: 'text', text: question }] }];
}

const usageOf = (usage) => ({ prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens });

export async function ask({ base_url, model, question, pictures, ...options }) {
  const answer = await connect(base_url).chat.completions.create({
    model, messages: messages(question, pictures), temperature: 0, max_tokens: 64, ...options,
  });
  const [choice] = answer.choices;
  return { text: choice.message.content, finish_reason: choice.finish_reason, ...usageOf(answer.usage) };
}

// By the client's own helper, which puts the chunks together and checks them.
export async function stream({ base_url, model, question, pictures }) {
  const events = connect(base_url).chat.completions.stream({
    model, messages: messages(question, pictures), temperature: 0, max_tokens: 64,
    stream_options: { include_usage: true },
  });
  const pieces = [];
  events.on('content', (piece) => pieces.push(piece));
  const answer = await events.finalChatCompletion();
  const usage = await events.totalUsage();
  return { pieces, finish_reason: answer.choices[0].finish_reason, ...usageOf(usage) };
}

export async function several({ base_url, model, question, n }) {
  const answer = await connect(base_url).chat.completions.create({
    model, messages: messages(question), n, temperature: 1.5, seed: 1, max_tokens: 16,
  });
  return answer.choices.map((choice) => choice.message.content);
}

export async function logprobs({ base_url, model, question }) {
  const answer = await connect(base_url).chat.completions.create({
    model, messages: messages(question), temperature: 0, max_tokens: 8, logprobs: true, top_logprobs: 2,
  });
  return answer.choices[0].logprobs.content.map(
    (each) => [each.token, each.logprob, each.top_logprobs.map((top) => top.logprob)],
  );
}

function input(question, pictures = []) {
  const content = pictures.map((url) => ({ type: 'input_image', image_url: url, detail: 'auto' }));
  return [{ role: 'user', content: [...content, { type: 'input_text', text: question }] }];
}

const used = (usage) => ({ prompt_tokens: usage.input_tokens, completion_tokens: usage.output_tokens });

export async function respond({ base_url, model, question, pictures }) {
  const answer = await connect(base_url).responses.create({
    model, input: input(question, pictures), temperature: 0, max_output_tokens: 64,
  });
  return { text: answer.output_text, ...used(answer.usage) };
}

export async function respond_stream({ base_url, model, question, pictures }) {
  const events = connect(base_url).responses.stream({
    model, input: input(question, pictures), temperature: 0, max_output_tokens: 64,
  });
  const pieces = [];
  events.on('response.output_text.delta', (event) => pieces.push(event.delta));
  return { pieces, ...used((await events.finalResponse()).usage) };
}

export async function models({ base_url }) {
  const client = connect(base_url);
  const found = [];
  for await (const each of client.models.list()) found.push((await client.models.retrieve(each.id)).id);
  return found;
}

export async function parse({ base_url, model, question, pictures }) {
  const answer = await connect(base_url).chat.completions.parse({
    model, messages: messages(question, pictures), temperature: 0,
    response_format: zodResponseFormat(Shape, 'shape'),
  });
  return answer.choices[0].message.parsed;
}

export async function parse_response({ base_url, model, question, pictures }) {
  const answer = await connect(base_url).responses.parse({
    model, input: input(question, pictures), temperature: 0, text: { format: zodTextFormat(Shape, 'shape') },
  });
  return answer.output_parsed;
}

const choices = {
  named: { type: 'function', function: { name: 'report' } }, required: 'required', auto: 'auto', none: 'none',
};

function called({ message, finish_reason }) {
  const calls = (message.tool_calls ?? []).map((each) => (
    { name: each.function.name, arguments: JSON.parse(each.function.arguments) }
  ));
  return { calls, text: message.content, finish_reason };
}

const tool = () => zodFunction({ name: 'report', description: 'Reports a shape.', parameters: Shape });

export async function call_tool({ base_url, model, question, choice }) {
  const answer = await connect(base_url).chat.completions.parse({
    model, messages: messages(question), temperature: 0, max_tokens: 512,
    tools: [tool()], tool_choice: choices[choice],
  });
  return called(answer.choices[0]);
}

// By the client's own helper, which puts the deltas together and parses the arguments.
export async function call_tool_stream({ base_url, model, question, choice }) {
  const events = connect(base_url).chat.completions.stream({
    model, messages: messages(question), temperature: 0, max_tokens: 512,
    tools: [tool()], tool_choice: choices[choice],
  });
  return called((await events.finalChatCompletion()).choices[0]);
}

export async function answer_behind_tool({ base_url, model, question }) {
  const client = connect(base_url);
  const asked = { model, temperature: 0, max_tokens: 512, tools: [tool()] };
  const history = messages(question);
  const first = await client.chat.completions.create({ ...asked, messages: history, tool_choice: 'required' });
  const { message } = first.choices[0];
  const results = message.tool_calls.map(({ id }) => ({ role: 'tool', tool_call_id: id, content: 'done' }));
  const answer = await client.chat.completions.create({
    ...asked, messages: [...history, message, ...results], tool_choice: 'none',
  });
  const ids = message.tool_calls.map(({ id }) => id);
  return { ...called(first.choices[0]), text: answer.choices[0].message.content, ids };
}
